"""Launch lines: what a person types to train, and what a launcher makes of it for each rank.

A line without a launcher (`train.py …`, `python train.py …`, `python -m package.module …`) is read here. A launcher is
asked: its line is run with a `sitecustomize` in front that has each rank write down how it was started, and end.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.running.job_environment import without_job
from ds_tune.objectives.workload.script import ScriptStart

CAPTURE_SECONDS = 120.0

LAUNCHERS = ("deepspeed", "torchrun", "accelerate")
"""Programs that start ranks; likewise `python -m torch.distributed.run` and its like."""

LAUNCHER_MODULES = (
    "torch.distributed.run", "torch.distributed.launch", "deepspeed.launcher.runner", "deepspeed.launcher.launch",
    "accelerate.commands.launch",
)  # fmt: skip

_PYTHON = re.compile(r"python(3(\.\d+)?)?")
_LOCAL_RANK = re.compile(r"(--local[_-]rank)(?:=(\d+))?")

_OF_EVERY_LAUNCHER = {
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE", "PYTHONPATH", "NODE_RANK",
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "_", "PATH", "PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_CACHE_DIR",
}  # fmt: skip
"""Variables that ds-tune's own launcher sets, or that say where one rank of one run is."""

_OF_ONE_RUN = ("TORCHELASTIC_", "NCCL_ASYNC", "TORCH_NCCL_ASYNC", "DS_TUNE_")
"""Beginnings of others; with TORCHELASTIC_USE_AGENT_STORE rank 0 would wait for a store that nobody hosts."""

CAPTURE = """\
import ctypes, json, os, sys
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG: whoever waits for something ends with who started it
words = [word for word in sys.orig_argv[1:] if word != "-m" and not word.startswith("-")]
is_launcher = not words or os.path.basename(words[0]) in {launchers!r} or words[0] in {modules!r}
if "RANK" not in os.environ and not is_launcher and "-c" not in sys.orig_argv:
    os.environ.update(RANK="0", WORLD_SIZE="1")  # the script, which a launcher of one process starts plainly
if "RANK" in os.environ:
    with open(os.path.join({folder!r}, os.environ["RANK"] + ".part"), "w") as file:
        json.dump({{"argv": sys.orig_argv, "environment": dict(os.environ), "folder": os.getcwd()}}, file)
    os.rename(file.name, file.name.removesuffix("part") + "json")
    os._exit(0)
"""


def read_launch_line(words: Sequence[str]) -> tuple[ScriptStart, int | None]:
    """How a launch line starts the ranks of a script, and how many; None where it does not say.

    Raises:
        UsageError: it starts no script.
    """
    words = list(words)
    if Path(words[0]).name in LAUNCHERS or _is_launcher_module(words):
        return _captured(words)
    if _PYTHON.fullmatch(Path(words[0]).name):
        words = words[1:]
        while words and words[0] in ("-u", "-O", "-OO"):
            words = words[1:]
    if words[:1] == ["-m"] and len(words) > 1:
        return _start(words[1], words[2:], is_module=True), None
    if not words or words[0].startswith("-"):
        raise UsageError("the line after -- names no training script; write it as you launch it, such as -- train.py")
    return _start(words[0], words[1:], is_module=False), None


def _is_launcher_module(words: Sequence[str]) -> bool:
    return words[1:2] == ["-m"] and (words[2:3] or [""])[0] in LAUNCHER_MODULES


def _start(program: str, arguments: Sequence[str], *, is_module: bool) -> ScriptStart:
    if not is_module:
        _check_script(Path(program))
        program = str(Path(program).absolute())
    return ScriptStart(
        program=program,
        is_module=is_module,
        arguments=tuple(arguments),
        local_rank_flag=None,
        environment={},
        folder=os.getcwd(),
        launcher=(),
    )


def _check_script(path: Path) -> None:
    if path.is_file():
        return
    if path.suffix != ".py" and (shutil.which(str(path)) or "=" in path.name):
        raise UsageError(
            f"{path} is no launcher that ds-tune knows; behind -- come deepspeed, torchrun, accelerate launch, python "
            "or the script itself, and variables belong in front of the command"
        )
    raise UsageError(f"{path}: there is no such training script; write the line after -- as you launch it")


def _captured(words: Sequence[str]) -> tuple[ScriptStart, int]:
    """Runs a launcher up to where the script would begin."""
    _check_one_machine(words)
    program = shutil.which(words[0], path=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]))
    if program is None:
        raise UsageError(f"{words[0]} is not installed beside this Python; install it, or leave the launcher out")
    with tempfile.TemporaryDirectory(prefix="ds-tune-launch-") as scratch:
        site, dumps = Path(scratch, "site"), Path(scratch, "ranks")
        site.mkdir()
        dumps.mkdir()
        (site / "sitecustomize.py").write_text(
            CAPTURE.format(folder=str(dumps), launchers=LAUNCHERS, modules=LAUNCHER_MODULES)
        )
        paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**without_job(os.environ), "PYTHONPATH": os.pathsep.join(paths)}
        if (size := os.environ.get("LOCAL_SIZE")) is not None:
            environment["LOCAL_SIZE"] = size  # for DeepSpeed's launcher it is how many ranks a CPU has
        environment["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
        said = _run(program, words[1:], environment)
        ranks = [json.loads(path.read_text()) for path in sorted(dumps.glob("*.json"), key=lambda p: int(p.stem))]
    if not ranks:
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "it said nothing")
        raise UsageError(f"{words[0]} started no rank of a script: {last.strip()}")
    nodes = int(ranks[0]["environment"].get("WORLD_SIZE", len(ranks)))
    if nodes != len(ranks):
        raise UsageError(
            f"the line starts {nodes} ranks, {len(ranks)} of them here: ds-tune tunes on one machine; leave out others"
        )
    _check_devices(ranks[0]["environment"].get("CUDA_VISIBLE_DEVICES"), len(ranks))
    return _start_of(ranks[0], words), len(ranks)


def _check_one_machine(words: Sequence[str]) -> None:
    """
    Raises:
        UsageError: a launcher is told of several machines, and would wait for the others.
    """
    for index, word in enumerate(words):
        option, _, value = word.partition("=")
        if option.replace("_", "-") in ("--nnodes", "--num-nodes", "--num-machines"):
            value = value or (words[index + 1] if index + 1 < len(words) else "")
            if value.rpartition(":")[2] not in ("1", "-1", ""):
                raise UsageError(
                    f"the launch line is for {value} machines ({option}): ds-tune tunes on one; leave that option out"
                )


def _check_devices(chosen: str | None, ranks: int) -> None:
    """
    Raises:
        UsageError: the launcher gave its ranks other GPUs than the first that are visible here.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = visible.split(",")[:ranks] if visible else [str(index) for index in range(ranks)]
    if chosen not in (None, visible, ",".join(first)):
        raise UsageError(
            f"the launch line chooses the GPUs {chosen}: write CUDA_VISIBLE_DEVICES={chosen} in front of the command, "
            "and leave that choice out"
        )


def _run(program: str, arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """Runs a program in a process group of its own, which ends with it; what it said."""
    with subprocess.Popen(
        [program, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", env=dict(environment), start_new_session=True,
    ) as process:  # fmt: skip
        try:
            said, _ = process.communicate(timeout=CAPTURE_SECONDS)
        except subprocess.TimeoutExpired:
            said = f"it did not end within {CAPTURE_SECONDS:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return said


def _start_of(rank: Mapping[str, Any], words: Sequence[str]) -> ScriptStart:
    """What a rank wrote down, as a start."""
    argv = list(rank["argv"])[1:]
    while argv and argv[0].startswith("-") and argv[0] != "-m":
        argv = argv[1:]  # -u, of Python itself
    is_module = argv[0] == "-m"
    program, *arguments = argv[1:] if is_module else argv
    flags = [match for word in arguments if (match := _LOCAL_RANK.fullmatch(word)) and match[2] is not None]
    flag = flags[0] if flags and flags[0][0] not in words else None
    if flag is not None:
        arguments.remove(flag[0])
    environment = {
        name: value
        for name, value in rank["environment"].items()
        if name not in _OF_EVERY_LAUNCHER and not name.startswith(_OF_ONE_RUN) and os.environ.get(name) != value
    }  # fmt: skip
    if not is_module:
        program = str(Path(rank["folder"], program))
        _check_script(Path(program))
    # The launch line ends as the rank's arguments do: what is in front of the script is the launcher's.
    front = len(words) - len(arguments) - 1
    return ScriptStart(
        program=program,
        is_module=is_module,
        arguments=tuple(arguments),
        local_rank_flag=flag[1] if flag is not None else None,
        environment=environment,
        folder=rank["folder"],
        launcher=tuple(words[:front]),
    )
