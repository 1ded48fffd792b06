"""DeepSpeed's own autotuner on ds-tune's workload, for comparison: how long it takes, and how fast its choice trains.

    python benchmarks/deepspeed_autotuner.py --out FILE [--stage default|all] [--global-batch N] [--timeout S]
                                             [--verify N] [--gpus N]

Runs `deepspeed --autotuning tune` in its fast mode on all GPUs, or on two CPU ranks where there are none, with the
DeepSpeed settings that ds-tune's trials have, and writes one JSON document. `seconds` is the wall clock's, from the
launcher's start to its end; ops are compiled before it. Each `throughput` is the autotuner's own metric, in samples a
second. `--verify` launches the winner N times by the plain launcher and records the samples a second from end to end,
as reproduce.py does for ours; where the autotuner was stopped, the winner is the best that it had measured.

What DeepSpeed 0.19.8 needs on one machine, which this script provides without touching DeepSpeed:

- It starts its experiments by the name `deepspeed` and drops `--module`: a `deepspeed` for this Python comes first on
  PATH, and a script of two lines stands for the module.
- After each experiment it calls `pdsh … pkill -f NAME`. Without pdsh that raises in a thread which has nothing left to
  do, and no process has NAME in its command line (the configuration is base64 there): a `pdsh` that does nothing keeps
  the log readable and changes nothing else. Neither ssh nor a host file is needed.
- On the CPU it counts NUMA nodes for devices unless LOCAL_SIZE is set, and it takes all of the host's memory for each
  rank's, so that it would try a micro-batch of a thousand: there it gets ds-tune's limit. It drops a user's own ZeRO
  settings, bucket sizes included, so that its CPU trials run with buckets of 5e8 elements.
- Its experiments always take the first GPUs of the machine, whatever CUDA_VISIBLE_DEVICES says.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # ds-tune need not be installed to be compared with
sys.path.insert(0, str(Path(__file__).resolve().parent))

from autotuner_results import experiments, winner

from ds_tune.objectives.ds_config import deepspeed_config
from ds_tune.objectives.errors import DsTuneError, EnvironmentFault, UsageError
from ds_tune.objectives.machine import Machine, detect_machine, software_versions
from ds_tune.objectives.running import guard
from ds_tune.objectives.running.local_launcher import threads_per_rank
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload, check_workload
from ds_tune.tuner.arguments import in_options, positive
from ds_tune.tuner.backend import DEFAULTS

CHECKOUT = Path(__file__).resolve().parents[1]
TUNED_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "zero_optimization")
PREPARE_SECONDS = 600.0
VERIFY_SECONDS = 240.0
GROUP_ENDS_SECONDS = 10.0

TRAIN = """\
from ds_tune.objectives.rank.train import main

main()
"""

# What DeepSpeedObjective's ranks do; the libraries come first, as they do there.
TRAIN_CAPPED = """\
import json, os
from ds_tune.objectives.rank.train import main
from ds_tune.objectives.machine import Machine
from ds_tune.objectives.rank.device import cap_memory
machine = Machine.from_json(json.loads({machine!r}))
if machine.device == "cuda":
    import torch
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
cap_memory(machine)
main()
"""

TUNE_CAPPED = """\
from deepspeed.accelerator import get_accelerator
get_accelerator().total_memory = lambda device_index=None: {capacity}
from deepspeed.launcher.runner import main
main()
"""

DEEPSPEED = """\
#!/bin/sh
exec '{python}' -m deepspeed.launcher.runner "$@"
"""

PDSH = """\
#!/bin/sh
exit 0
"""

LOAD_OP = """\
import json, sys
from deepspeed.accelerator import get_accelerator
from ds_tune.objectives.rank.ops import optimizer_op
name = optimizer_op(json.load(open(sys.argv[1])))
if name is not None:
    get_accelerator().create_op_builder(name).load()
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The folder in which the autotuner works, and what it tunes there."""

    folder: Path
    workload: HuggingFaceWorkload
    machine: Machine
    stage: str
    """`default`, which leaves the ZeRO stage to the autotuner (it then tries stage 0 only), or `all`."""
    global_batch: int | None = None
    """The largest train batch; the autotuner cannot be held to one."""

    @property
    def ds_config_path(self) -> Path:
        return self.folder / "ds_config.json"

    @property
    def results(self) -> Path:
        return self.folder / "autotuning_results"

    def write_files(self, *, resume: bool = False) -> None:
        """Everything that the autotuner finds in its folder; of an earlier run only what it is to build on."""
        for left in () if resume else (self.results, self.folder / "autotuning_exps"):
            shutil.rmtree(left, ignore_errors=True)
        programs = self.folder / "bin"
        programs.mkdir(parents=True, exist_ok=True)
        for name, text in {"deepspeed": DEEPSPEED.format(python=sys.executable), "pdsh": PDSH}.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        capped = TRAIN_CAPPED.format(machine=json.dumps(self.machine.to_json()))
        (self.folder / "train.py").write_text(TRAIN if self.machine.memory_cap_bytes is None else capped)
        (self.folder / "tune.py").write_text(TUNE_CAPPED.format(capacity=self.machine.capacity_bytes))
        document = user_config(self.workload, self.machine, self.stage, self.global_batch)
        document["autotuning"]["overwrite"] = not resume  # else it clears its folder before it begins
        self.ds_config_path.write_text(json.dumps(document, indent=2))

    def environment(self) -> dict[str, str]:
        """See the head of this file."""
        paths = [str(self.folder / "bin"), os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]
        modules = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
        found = {**os.environ, "PATH": os.pathsep.join(paths), "PYTHONPATH": os.pathsep.join(modules)}
        found.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if self.machine.device == "cuda":
            found["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.machine.device_ids))
        else:
            found |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "LOCAL_SIZE": str(self.machine.ranks)}
            found.setdefault("OMP_NUM_THREADS", str(threads_per_rank(self.machine)))
        return found

    def launch(self, options: Sequence[str], ds_config: Path, extra: Sequence[str] = ()) -> list[str]:
        """The launcher's command line; `extra` are arguments of the training script."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        # What the autotuner takes for a GPU's memory has to be the cap, or it would try what cannot fit.
        tuning_capped = "--autotuning" in options and self.machine.memory_cap_bytes is not None
        program = ["tune.py"] if tuning_capped else ["-m", "deepspeed.launcher.runner"]
        launcher = [sys.executable, *program, *options, "--master_port", str(port)]
        script = ["train.py", "--model", self.workload.model, "--seq-len", str(self.workload.seq_len), *extra]
        return [*launcher, *script, "--deepspeed", "--deepspeed_config", str(ds_config)]

    def run(self, command: Sequence[str], log: str, seconds: float) -> int | None:
        return run_alone(command, self.folder, self.environment(), self.folder / log, seconds)

    def prepare(self) -> None:
        """Compiles the optimizer's op, as ds-tune does before its first trial.

        Raises:
            EnvironmentFault: it cannot be compiled here.
        """
        command = [sys.executable, "-c", LOAD_OP, str(self.ds_config_path)]
        if self.run(command, "prepare.log", PREPARE_SECONDS) != 0:
            raise EnvironmentFault(f"DeepSpeed's optimizer cannot be loaded:\n{tail(self.folder / 'prepare.log')}")

    def verify(self, ds_config: dict[str, Any]) -> float:
        """Samples per second of one plain run, from end to end.

        Raises:
            EnvironmentFault: it failed or took too long.
        """
        config, figures = self.folder / "ds_config_verified.json", self.folder / "figures.json"
        config.write_text(json.dumps(ds_config))
        figures.unlink(missing_ok=True)
        if self.run(self.launch([], config, ["--json", str(figures)]), "verify.log", VERIFY_SECONDS) != 0:
            raise EnvironmentFault(f"the winner does not run again:\n{tail(self.folder / 'verify.log')}")
        return float(json.loads(figures.read_text())["samples_per_second"])


def user_config(
    workload: HuggingFaceWorkload, machine: Machine, stage: str, global_batch: int | None = None
) -> dict[str, Any]:
    """Config that a user would hand to the autotuner: the settings of ds-tune's trials, less what is to be tuned."""
    config = TrialConfig(zero_stage=0, micro_batch_size=1, gradient_accumulation_steps=1)
    document = deepspeed_config(config, workload, ranks=machine.ranks, device=machine.device)
    for key in TUNED_KEYS:
        document.pop(key, None)
    if stage == "all":
        document["zero_optimization"] = {"stage": "all"}
    document["autotuning"] = {"enabled": True, "fast": True}
    if machine.device == "cpu":
        document["autotuning"]["max_train_micro_batch_size_per_gpu"] = DEFAULTS["cpu"].max_micro_batch
    if global_batch is not None:
        document["autotuning"]["max_train_batch_size"] = global_batch
    return document


def run_alone(
    command: Sequence[str],
    folder: Path,
    environment: dict[str, str],
    log: Path,
    seconds: float,
    *,
    grace_seconds: float = 0.0,
) -> int | None:
    """The exit status of a command, or None where it was killed after so many seconds; nothing of it is left.

    Args:
        log: its output is appended there.
        grace_seconds: how long it may take to end by itself, once told to, before it is killed.
    """
    # The guard leads the process group: if this script is killed, so is all that it started.
    leader = subprocess.Popen([sys.executable, "-I", "-S", guard.__file__], stdin=subprocess.PIPE, process_group=0)
    process = None
    try:
        with log.open("ab") as out:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                process_group=leader.pid,
            )
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process is not None and process.poll() is None and grace_seconds:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=grace_seconds)
        os.killpg(leader.pid, signal.SIGKILL)
        if process is not None:
            process.wait()
        wait_for_group(leader)


def wait_for_group(leader: subprocess.Popen[bytes]) -> None:
    """Until the killed group's processes are gone: the next run needs the memory that theirs still held."""
    deadline = time.monotonic() + GROUP_ENDS_SECONDS
    leader.communicate()
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(leader.pid, 0)
            time.sleep(0.1)


def tail(path: Path, lines: int = 20) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def check_visible(machine: Machine) -> None:
    """
    Raises:
        UsageError: other GPUs are meant than those which the autotuner would take.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if machine.device != "cuda" or visible is None:
        return
    entries = [entry.strip() for entry in visible.split(",")]
    if entries != [str(index) for index in range(len(entries))]:
        raise UsageError(
            f"CUDA_VISIBLE_DEVICES={visible}: DeepSpeed's autotuner always takes the machine's first GPUs; "
            "list them as 0,1,… or unset it"
        )


def bench_of(arguments: argparse.Namespace) -> Bench:
    """
    Raises:
        DsTuneError: what was asked cannot be run here.
    """
    machine = detect_machine(gpus=arguments.gpus, cpu_ranks=2, memory_cap_bytes=None)
    check_visible(machine)
    defaults = DEFAULTS[machine.device]
    workload = HuggingFaceWorkload(
        model=arguments.model or defaults.model,
        seq_len=arguments.seq_len or defaults.seq_len,
        dtype=arguments.dtype or defaults.dtype,
    )
    check_workload(workload)
    folder = (arguments.folder or arguments.out.with_name(f"{arguments.out.stem}-files")).resolve()
    return Bench(
        folder=folder,
        workload=workload,
        machine=machine,
        stage=arguments.stage,
        global_batch=arguments.global_batch,
    )


def compare(bench: Bench, arguments: argparse.Namespace) -> int:
    """Tunes, verifies, and writes what is known after each of them."""
    bench.write_files()
    bench.prepare()
    command = bench.launch(["--autotuning", "tune"], bench.ds_config_path)
    print(f"{bench.machine.description}: {bench.workload.description}, stage {bench.stage}", flush=True)
    started = time.monotonic()
    status = bench.run(command, "autotuner.log", arguments.timeout)
    seconds = time.monotonic() - started
    rows = experiments(bench.results)
    won = winner(bench.results, rows)
    document: dict[str, Any] = {
        "hardware": bench.machine.description,
        "machine": bench.machine.to_json(),
        "model": bench.workload.model,
        "seq_len": bench.workload.seq_len,
        "dtype": bench.workload.dtype,
        "versions": software_versions(),
        "stage": bench.stage,
        "seconds": round(seconds, 3),
        "timeout_seconds": arguments.timeout,
        "finished": status == 0,
        "experiments": rows,
        "winner": won,
        "verified_samples_per_second": [],
    }
    arguments.out.write_text(json.dumps(document, indent=2))
    for row in rows:
        print(json.dumps(row), flush=True)
    ended = "finished" if status == 0 else "stopped" if status is None else f"ended with status {status}"
    print(
        f"{ended} after {seconds:.1f} s and {len(rows)} experiments: {won['name'] if won else 'no winner'}", flush=True
    )
    if won is None:
        print(tail(bench.folder / "autotuner.log"), file=sys.stderr)
        return 1
    for _ in range(arguments.verify):
        document["verified_samples_per_second"].append(bench.verify(won["ds_config"]))
        arguments.out.write_text(json.dumps(document, indent=2))
        print(f"verified: {document['verified_samples_per_second'][-1]:.3f} samples/s", flush=True)
    return 0


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON document")
    parser.add_argument("--stage", choices=["default", "all"], default="default", help="of zero_optimization")
    parser.add_argument("--global-batch", type=positive, metavar="N", help="the largest that it may try")
    parser.add_argument("--timeout", type=float, default=3600, metavar="S", help="stop the autotuner after S seconds")
    parser.add_argument("--verify", type=int, default=0, metavar="N", help="train with the winner N times")
    parser.add_argument("--gpus", type=int, help="the first N GPUs; 0 for two CPU ranks")
    parser.add_argument("--folder", type=Path, help="where the autotuner works; default: beside the document")
    parser.add_argument("--model", help="as for ds-tune, likewise below")
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--dtype")
    arguments = parser.parse_args(words)
    try:
        return compare(bench_of(arguments), arguments)
    except DsTuneError as error:
        print(f"deepspeed_autotuner: {in_options(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    sys.exit(main())
