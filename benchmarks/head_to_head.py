"""DeepSpeed's autotuner and ds-tune on the same GPUs and the same training: whose choice trains faster, found how fast.

    python benchmarks/head_to_head.py --out DIR [--gpus N | --ranks N] [--preset speed|full] [--rounds 3]

Three contestants: `deepspeed`, DeepSpeed's autotuner in its fast mode over all ZeRO stages, or with --stage default
over the one that it takes by default; `core`, ds-tune with 9
trials; and ds-tune's wide preset with 20. A fourth on request, `matched`: the wide preset at the global batch of the
autotuner's winner. None of them verifies: when all have chosen, the choices run again by the code that times ds-tune's
trials, each time in fresh processes, one after the other, the order turned from round to round. On GPUs the optimizer's
op is compiled before all of it.

It takes --call-seconds at most, ends what it started, and says that the same command goes on (exit status 130); it may
as well be killed at any moment. What is done is not repeated. `tuning s` is the wall clock's over all calls. Of the
autotuner it leaves out what interruptions cost: the experiment that was cut off, and starting again. Of ds-tune it
does not.

DIR gets head_to_head.json (everything, also while it is not complete), table.md, verification.jsonl (a line a run), and
a folder a contestant. The autotuner cannot be held to a global batch: --global-batch is its largest, and the table has
those of the choices. --memory-cap limits its experiments, and is what it takes for a GPU's memory.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # ds-tune need not be installed
sys.path.insert(0, str(Path(__file__).resolve().parent))

from comparison import AUTOTUNER, Runs, Sessions, claim, next_run, rate_of, run_seconds, table
from contestants import Autotuner, Choice, Contestant, DsTune, close_left_open
from deepspeed_autotuner import CHECKOUT, Bench, check_visible

from ds_tune.objectives.ds_config import deepspeed_config
from ds_tune.objectives.errors import DsTuneError, EnvironmentFault, UsageError
from ds_tune.objectives.files import write_atomically
from ds_tune.objectives.machine import Machine, detect_machine, software_versions
from ds_tune.objectives.running.deepspeed_objective import DeepSpeedObjective
from ds_tune.objectives.running.local_launcher import LocalLauncher
from ds_tune.objectives.running.rank_group import ignore
from ds_tune.objectives.timing.step_plan import PRECISE
from ds_tune.objectives.trial import Measurement
from ds_tune.objectives.workload.huggingface import SHIPPED_MODELS, HuggingFaceWorkload, check_workload
from ds_tune.tuner.arguments import in_options, positive
from ds_tune.tuner.backend import DEFAULTS
from ds_tune.tuner.request import DEFAULT_TRIAL_SECONDS, parse_memory

WIDE = "wide"
MATCHED = "matched"
LEAST_TUNING_SECONDS = 60.0
"""A search may be cut at any moment, but starting it again has its price."""

EXIT_GOES_ON = 130


class CallOver(BaseException):
    """This call's time is up, or somebody ends it. No Exception, so that nothing on the way takes it for a failure."""


@contextlib.contextmanager
def call(seconds: float) -> Iterator[None]:
    """Raises CallOver in the main thread after so many seconds or at a signal, once: cleaning up is not disturbed."""
    numbers = (signal.SIGALRM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def over(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        why = f"{seconds:.0f} s are over" if number == signal.SIGALRM else signal.Signals(number).name
        raise CallOver(why)

    for number in numbers:
        signal.signal(number, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class HeadToHead:
    """One comparison in its folder, from wherever an earlier call left it."""

    def __init__(self, bench: Bench, out: Path, arguments: argparse.Namespace, asked: dict[str, Any]) -> None:
        self._out = out
        self._workload, self._machine = bench.workload, bench.machine
        self._bench = bench
        self._asked = asked
        self._rounds: int = arguments.rounds
        self._deadline = time.monotonic() + arguments.call_seconds
        self._begun = False
        self._runs = Runs(out / "verification.jsonl")
        self._launcher = LocalLauncher(bench.machine)

        def sessions(name: str) -> Sessions:
            return Sessions(out / f"{name}.sessions.json")

        def asked_for() -> list[str]:
            return ds_tune_options(bench, arguments, bench.global_batch)

        def matching() -> list[str]:
            choice = autotuner.choice()
            if choice is None:
                raise EnvironmentFault("the autotuner chose nothing, so that there is no global batch of its to match")
            return ds_tune_options(bench, arguments, choice.config.global_batch_size(self._machine.ranks))

        wide, trials = arguments.preset, arguments.wide_trials
        autotuner = Autotuner(bench, sessions(AUTOTUNER), arguments.autotuner_seconds)
        everybody: dict[str, Contestant] = {
            AUTOTUNER: autotuner,
            "core": DsTune("core", "core", arguments.core_trials, asked_for, bench, sessions("core")),
            WIDE: DsTune(wide, wide, trials, asked_for, bench, sessions(wide)),
            MATCHED: DsTune(MATCHED, wide, trials, matching, bench, sessions(MATCHED)),
        }
        self._contestants = [each for name, each in everybody.items() if name in arguments.contestants]

    def run(self) -> None:
        """
        Raises:
            CallOver: the rest is for another call.
            EnvironmentFault: a contestant failed.
        """
        waiting = [contestant for contestant in self._contestants if not contestant.sessions.done]
        if waiting and self._machine.device == "cuda":
            self._bench.write_files(resume=True)
            self._bench.prepare()
        for contestant in waiting:
            self._begin(LEAST_TUNING_SECONDS)
            say(f"{contestant.name} tunes")
            try:
                contestant.tune()
            finally:
                latest = contestant.sessions.all[-1]
                say(f"{contestant.name}: {latest['how']} after {latest['seconds']:.0f} s")
        choices = {each.name: each.choice() for each in self._contestants}
        found = {name: choice for name, choice in choices.items() if choice is not None}
        self.write()
        while (turn := next_run(list(found), self._runs.all, self._rounds)) is not None:
            self._begin(run_seconds(self._runs.all))
            self._verify(*turn, found[turn[1]])
            self.write()

    def _begin(self, seconds: float) -> None:
        """
        Raises:
            CallOver: what is to begin needs longer than is left, and would have more in a call of its own.
        """
        left = self._deadline - time.monotonic()
        if self._begun and left < seconds:
            raise CallOver(f"{left:.0f} s are left, and the next part may need {seconds:.0f}")
        self._begun = True

    def _verify(self, turn: int, name: str, choice: Choice) -> None:
        folder = self._out / "verification" / name
        folder.mkdir(parents=True, exist_ok=True)
        objective = DeepSpeedObjective(
            dataclasses.replace(self._workload, base_ds_config=choice.base_ds_config),
            self._machine,
            launcher=self._launcher,
            log_folder=folder,
            trial_seconds=DEFAULT_TRIAL_SECONDS,
            plan=PRECISE,
            fresh_ranks=True,
        )
        began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        started = time.monotonic()
        try:
            outcome = objective.run(choice.config, folder, ignore)
        finally:
            objective.close()
        self._runs.add(
            round=turn,
            contestant=name,
            began=began,
            host=this_host(),
            wall_seconds=round(time.monotonic() - started, 3),
            outcome=outcome.to_json(),
        )
        told = f"{outcome.samples_per_second:.3f} samples/s" if isinstance(outcome, Measurement) else outcome.message
        say(f"round {turn + 1}, {name}, {choice.config.name}: {told}")

    def write(self) -> str:
        """Writes what is known, and returns the table."""
        rows = [self._row(contestant) for contestant in self._contestants]
        found = [row["name"] for row in rows if row["winner"]]
        tuned = all(row["done"] for row in rows)
        document = {
            **self._asked,
            "complete": tuned and next_run(found, self._runs.all, self._rounds) is None,
            "contestants": rows,
            "verification": self._runs.all,
        }
        printed = table(rows, self._runs.all)
        hosts = {run["host"] for run in self._runs.all}
        if len(hosts) > 1:
            printed += f"\n\nVerified on {len(hosts)} hosts: runs of one round compare, others need not."
        write_atomically(self._out / "head_to_head.json", json.dumps(document, indent=2))
        write_atomically(self._out / "table.md", printed + "\n")
        return printed

    def _row(self, contestant: Contestant) -> dict[str, Any]:
        """All that is known of a contestant."""
        close_left_open(contestant)
        choice = contestant.choice()
        rate = rate_of(contestant.name, self._runs.all)
        base = rate_of(AUTOTUNER, self._runs.all)
        return {
            "name": contestant.name,
            "done": contestant.sessions.done,
            "tuning_seconds": contestant.sessions.seconds,
            "calls": len(contestant.sessions.all),
            "sessions": [self._without_paths(each) for each in contestant.sessions.all],
            **contestant.counts(),
            "winner": choice and self._winner(choice),
            "verified": rate and dataclasses.asdict(rate),
            "over_the_autotuner": rate.over(base) if rate and base and contestant.name != AUTOTUNER else None,
        }

    def _winner(self, choice: Choice) -> dict[str, Any]:
        workload = dataclasses.replace(self._workload, base_ds_config=choice.base_ds_config)
        ranks, device = self._machine.ranks, self._machine.device
        return {
            "name": choice.config.name,
            "config": choice.config.to_json(),
            "global_batch": choice.config.global_batch_size(ranks),
            "ds_config": deepspeed_config(choice.config, workload, ranks=ranks, device=device),
            "said": choice.said,
        }

    def _without_paths(self, session: dict[str, Any]) -> dict[str, Any]:
        words = [word.replace(sys.executable, "python").replace(str(self._out), "DIR") for word in session["command"]]
        return {**session, "command": words}


def ds_tune_options(bench: Bench, arguments: argparse.Namespace, global_batch: int | None) -> list[str]:
    """Options of ds-tune for what the autotuner has in its Bench."""
    workload, machine = bench.workload, bench.machine
    on = ["--gpus", str(machine.ranks)] if machine.device == "cuda" else ["--gpus", "0", "--ranks", str(machine.ranks)]
    cap = ["--memory-cap", arguments.memory_cap] if arguments.memory_cap else []
    batch = ["--global-batch", str(global_batch)] if global_batch else []
    trained = ["--model", workload.model, "--seq-len", str(workload.seq_len), "--dtype", workload.dtype]
    return [*trained, *on, *cap, *batch]


def this_host() -> str:
    """Tells two machines of one kind apart, also where both have the same name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return "unknown"


def say(text: str) -> None:
    print(text, flush=True)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the comparison's folder")
    parser.add_argument("--call-seconds", type=float, default=570, metavar="S", help="of this call (default 570)")
    parser.add_argument("--rounds", type=positive, default=3, help="of the verification (default 3)")
    names = (AUTOTUNER, "core", WIDE)
    parser.add_argument(
        "--contestants", nargs="+", choices=(*names, MATCHED), default=names, help=f"default all but {MATCHED}"
    )
    parser.add_argument("--preset", choices=("speed", "full"), default="speed", help="the wide one (default speed)")
    parser.add_argument("--core-trials", type=positive, default=9, metavar="N", help="default 9")
    parser.add_argument("--wide-trials", type=positive, default=20, metavar="N", help="default 20")
    parser.add_argument(
        "--autotuner-seconds", type=float, default=3600, metavar="S", help="of its tuning over all calls; then its best"
    )
    parser.add_argument(
        "--stage", choices=("default", "all"), default="all", help="ZeRO stages of the autotuner (default all)"
    )
    parser.add_argument("--gpus", type=int, help="the first N GPUs; 0 for CPU ranks")
    parser.add_argument("--ranks", type=positive, default=2, help="on the CPU (default 2)")
    parser.add_argument("--model", help="as for ds-tune, likewise below")
    parser.add_argument("--seq-len", type=positive)
    parser.add_argument("--dtype")
    parser.add_argument("--memory-cap", metavar="SIZE")
    parser.add_argument("--global-batch", type=positive)
    arguments = parser.parse_args(words)
    if MATCHED in arguments.contestants and AUTOTUNER not in arguments.contestants:
        parser.error(f"--contestants {MATCHED} needs {AUTOTUNER}, whose global batch it takes")
    return arguments


def prepare(arguments: argparse.Namespace) -> HeadToHead:
    """
    Raises:
        DsTuneError: what was asked cannot be run here, or not in this folder.
    """
    cap = parse_memory(arguments.memory_cap) if arguments.memory_cap else None
    machine: Machine = detect_machine(gpus=arguments.gpus, cpu_ranks=arguments.ranks, memory_cap_bytes=cap)
    check_visible(machine)
    defaults = DEFAULTS[machine.device]
    model = arguments.model or defaults.model
    if model not in SHIPPED_MODELS and Path(model).exists():
        model = str(Path(model).resolve())  # contestants work in folders of their own
    workload = HuggingFaceWorkload(
        model=model,
        seq_len=arguments.seq_len or defaults.seq_len,
        dtype=arguments.dtype or defaults.dtype,
    )
    check_workload(workload)
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    trials = {"core": arguments.core_trials, arguments.preset: arguments.wide_trials}
    asked = {
        "machine": machine.to_json(),
        "workload": workload.to_json(),
        "global_batch": arguments.global_batch,
        "contestants": sorted(arguments.contestants),
        "trials": trials,
        **({} if arguments.stage == "all" else {"stage": arguments.stage}),
        "versions": software_versions(),
    }
    claim(out / "asked.json", asked)
    say(f"{machine.description}: {workload.description}")
    bench = Bench(
        folder=out / AUTOTUNER,
        workload=workload,
        machine=machine,
        stage=arguments.stage,
        global_batch=arguments.global_batch,
    )
    document = {key: value for key, value in asked.items() if key != "contestants"}
    return HeadToHead(bench, out, arguments, {"hardware": machine.description, **document})


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse(words)
    # Ranks and searches start by module names, from folders of their own.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        comparison = prepare(arguments)
        try:
            with call(arguments.call_seconds):
                comparison.run()
        finally:
            say(comparison.write())
    except CallOver as why:
        say(f"{why}: the same command goes on from here.")
        return EXIT_GOES_ON
    except DsTuneError as error:
        print(f"head_to_head: {in_options(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
