"""`tune`, answered by a formula: the real command with another objective, for whole studies within a second or two.

    python -P analytic_tune.py [--answer ANSWER] [--kill POINT:COUNT] [--prepared FILE] ARGUMENT OF TUNE ...
    python -P analytic_tune.py --serve

The second form reads such commands from its standard input and runs each in a fork, so that most of a test is not
spent on imports. A tuner can kill itself with SIGKILL at a point of a trial's path, when it comes there for the
COUNTth time.
"""

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy.engine
import sqlalchemy.event

from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.numerics import STEPS, LossCurve
from ds_tune.objectives.objective import OnPhase
from ds_tune.objectives.timing.intervals import throughput
from ds_tune.objectives.trial import Failure, FailureKind, Measurement, Outcome, Provenance, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.storage.study_store import StudyStore
from ds_tune.tuner import backend, cli, study

ANSWERS = (
    "formula", "stage 0 does not fit", "nothing fits", "crash", "first crashes", "invalid", "hang",
    "stages 2 and 3 are refused", "stage 0 is refused",
    "stage 2 is fastest", "stage 2 is fastest and wrong", "stage 2 is fastest and cannot be compared",
)  # fmt: skip


def samples_per_second(config: TrialConfig) -> float:
    """Larger micro-batches are faster, with less and less to gain; each ZeRO stage costs a little."""
    rate = 100 * config.micro_batch_size / (config.micro_batch_size + 2)
    rate *= config.gradient_accumulation_steps / (config.gradient_accumulation_steps + 0.25)
    return rate * (1 - 0.04 * config.zero_stage)


def peak_memory_bytes(config: TrialConfig) -> int:
    """Model states that the stages divide, and activations of each sample."""
    return round((0.3 / (1 + config.zero_stage) + 0.05 * config.micro_batch_size) * GIB)


class AnalyticObjective:
    """See `objectives.objective.Objective`."""

    provenance = Provenance.MEASURED

    def __init__(self, machine: Machine, *, answer: str, prepared: Path | None) -> None:
        self._machine = machine
        self._answer = answer
        self._prepared = prepared
        self._runs = 0

    def prepare(self, configs: Iterable[TrialConfig] = ()) -> None:
        if self._prepared is not None:
            with self._prepared.open("a") as file:
                file.write("prepared\n")

    def run(
        self,
        config: TrialConfig,
        folder: Path,
        on_phase: OnPhase,
        *,
        best_samples_per_second: float | None = None,
    ) -> Outcome:
        self._runs += 1
        on_phase("timed steps")
        if self._answer == "hang":
            time.sleep(600)
        outcome = self._outcome(config)
        for log in ("stdout.log", "stderr.log"):
            (folder / log).write_bytes(b"")
        return outcome

    def losses(self, config: TrialConfig, folder: Path, on_phase: OnPhase) -> LossCurve | Failure:
        on_phase("numerics")
        if self._answer == "stage 2 is fastest and cannot be compared" and config.zero_stage == 0:
            return self._failure(config, FailureKind.CRASH, "rank 1 was killed by SIGSEGV in forward")
        wrong = self._answer == "stage 2 is fastest and wrong" and config.zero_stage == 2
        return LossCurve(losses=tuple((9.0 if wrong else 8.0) - 0.1 * step for step in range(STEPS)), skipped_steps=0)

    def _outcome(self, config: TrialConfig) -> Outcome:
        if self._answer == "invalid":
            return self._failure(config, FailureKind.INVALID_CONFIG, "rank 0 in engine: ValidationError: bad key")
        refused = {"stages 2 and 3 are refused": (2, 3), "stage 0 is refused": (0,)}.get(self._answer, ())
        if config.zero_stage in refused:
            return self._failure(config, FailureKind.INVALID_CONFIG, "rank 0 in engine: AssertionError: not here")
        if self._answer == "crash" or (self._answer == "first crashes" and self._runs == 1):
            return self._failure(config, FailureKind.CRASH, "rank 1 was killed by SIGSEGV in forward")
        peak_bytes = peak_memory_bytes(config)
        too_much = peak_bytes > self._machine.capacity_bytes
        too_much |= self._answer == "stage 0 does not fit" and config.zero_stage == 0
        if too_much or self._answer == "nothing fits":
            return self._failure(config, FailureKind.OUT_OF_MEMORY, "rank 0 in forward: OutOfMemoryError")
        samples = config.global_batch_size(self._machine.ranks)
        faster = 1.3 if self._answer.startswith("stage 2 is fastest") and config.zero_stage == 2 else 1.0
        mean = samples / samples_per_second(config) / faster
        step_seconds = tuple(mean * (1 + ripple) for ripple in (-0.02, 0.01, 0.0, 0.02, -0.01))
        rate, interval = throughput(step_seconds, samples)
        return Measurement(
            step_seconds=step_seconds,
            samples_per_second=rate,
            samples_per_second_ci95=interval,
            forward_seconds=0.25 * mean,
            backward_seconds=0.5 * mean,
            optimizer_seconds=0.125 * mean,
            deepspeed_samples_per_second=rate * 1.05,
            warmup_step_seconds=(mean, mean),
            skipped_steps=0,
            peak_memory_bytes=peak_bytes,
            reserved_memory_bytes=peak_bytes,
            alloc_retries=0,
            setup_seconds=1.0,
            wall_seconds=2.0,
            model_parameters=1_000_000,
            flops_per_sample=1.0e9,
        )

    def _failure(self, config: TrialConfig, kind: FailureKind, message: str) -> Failure:
        return Failure(
            kind=kind,
            message=message,
            phase="forward",
            rank=0,
            peak_memory_bytes=peak_memory_bytes(config) if kind is FailureKind.OUT_OF_MEMORY else None,
            log_tail="the last line of the log",
            wall_seconds=1.0,
        )

    def close(self) -> None:
        pass


# Where to die: whose method, which, and whether before or after it does its work.
POINTS: dict[str, tuple[Any, str, str]] = {
    "study created": (optuna, "create_study", "after"),
    "before the first trial": (AnalyticObjective, "prepare", "before"),
    "configuration queued": (StudyStore, "enqueue", "after"),
    "half of the parameters chosen": (optuna.Trial, "_suggest", "after"),
    "asked, not yet run": (study, "write_trial_inputs", "before"),
    "running": (AnalyticObjective, "run", "before"),
    "ranks wrote their results, nothing saved": (StudyStore, "save", "before"),
    "saved, not told": (StudyStore, "save", "after"),
    "step reported": (optuna.Trial, "report", "after"),
    "constraint set": (optuna.Trial, "set_constraint", "after"),
    "all told but the state": (optuna.Study, "tell", "before"),
    "told": (StudyStore, "tell", "after"),
    "interrupted trial queued, not failed": (StudyStore, "interrupt", "before"),
    "reason for the end stored": (StudyStore, "set_ended", "after"),
    "verified run stored": (StudyStore, "add_verification", "after"),
    "comparing losses": (AnalyticObjective, "losses", "before"),
    "losses compared": (StudyStore, "set_numerics", "after"),
    "winner found": (StudyStore, "set_winner", "before"),
    "winner forgotten": (StudyStore, "forget_winner", "after"),
    "finalist begun": (StudyStore, "begin", "after"),
    "finished, not exported": (cli, "export", "before"),
}


def kill_at(point: str, count: int) -> None:
    """Has this process kill itself when it comes to the point for the COUNTth time."""
    owner, name, when = POINTS[point]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **keywords)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapper)


def leave_writing_to_the_kernel(connection: Any, record: Any) -> None:
    """What a killed process wrote is in the kernel's cache and safe; waiting for the disk is half of a test's time."""
    connection.execute("PRAGMA synchronous=OFF")


def serve() -> None:
    """Answers each line, {"arguments", "folder", "stdout", "stderr"}, with the exit status as subprocess gives it."""
    optuna.storages.RDBStorage("sqlite:///:memory:")  # imports what a tuner imports when it opens its study
    for line in sys.stdin:
        command = json.loads(line)
        child = os.fork()
        if child == 0:
            os.chdir(command["folder"])
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(os.open(command["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(os.open(command["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            status = 70
            try:
                status = main(command["arguments"])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--answer", choices=ANSWERS, default="formula")
    parser.add_argument("--kill", metavar="POINT:COUNT")
    parser.add_argument("--prepared", type=Path)
    arguments, rest = parser.parse_known_args(words)

    def objective(workload: HuggingFaceWorkload, machine: Machine, **unused: Any) -> AnalyticObjective:
        return AnalyticObjective(machine, answer=arguments.answer, prepared=arguments.prepared)

    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "connect", leave_writing_to_the_kernel)
    backend.DeepSpeedObjective = objective  # type: ignore[assignment, misc]
    if arguments.kill:
        point, _, count = arguments.kill.partition(":")
        kill_at(point, int(count))
    return cli.main(rest)


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1:] == ["--serve"] else main(sys.argv[1:]))
