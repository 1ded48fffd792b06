"""Contestants: DeepSpeed's autotuner and ds-tune, each started, cut off and asked for its choice in one way."""

import contextlib
import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from autotuner_results import cut_experiment, experiments, lost_seconds, winner
from comparison import AUTOTUNER, Sessions, last_written, trial_of
from deepspeed_autotuner import Bench, run_alone, tail

from ds_tune.objectives.errors import EnvironmentFault, UsageError
from ds_tune.objectives.trial import Failure, FailureKind, TrialConfig
from ds_tune.storage.layout import ResultsFolder
from ds_tune.storage.records import StudySummary
from ds_tune.storage.study_store import StudyStore
from ds_tune.tuner.reports.document import study_document
from ds_tune.tuner.reports.report import Report

GRACE_SECONDS = 15.0
NO_LIMIT_SECONDS = 1e6


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Configuration that a contestant found."""

    config: TrialConfig
    base_ds_config: dict[str, Any]
    said: dict[str, Any]
    """Statements of the contestant itself about it."""


class Contestant(Protocol):
    """Somebody who tunes, over as many calls as it takes."""

    name: str
    folder: Path
    """All that it writes is here."""
    sessions: Sessions

    def tune(self) -> None:
        """Goes on until its search is over; `sessions.done` says so.

        Raises:
            EnvironmentFault: it failed for reasons of its own.
        """

    def settle(self, how: str, ended: float, *, cut: bool) -> None:
        """Closes the session that is open, and removes what the next must not find."""

    def counts(self) -> dict[str, Any]:
        """Returns what it tried: numbers, and the trials themselves."""

    def choice(self) -> Choice | None:
        """Returns what it found, or the best so far."""


class Autotuner:
    """DeepSpeed's, which goes on from the experiments that it finds in its folder."""

    def __init__(self, bench: Bench, sessions: Sessions, limit_seconds: float) -> None:
        self.name = AUTOTUNER
        self.folder = bench.folder
        self.sessions = sessions
        self._bench = bench
        self._limit_seconds = limit_seconds

    def tune(self) -> None:
        bench = self._bench
        bench.write_files(resume=True)
        command = bench.launch(["--autotuning", "tune"], bench.ds_config_path)
        with session(self, command) as ending:
            left = max(self._limit_seconds - self.sessions.seconds, 1.0)
            status = bench.run(command, "autotuner.log", left)
            ending.how = "stopped at its limit" if status is None else f"ended with status {status}"
        self.sessions.finish()
        if self.choice() is None:
            print(tail(bench.folder / "autotuner.log"), file=sys.stderr)

    def settle(self, how: str, ended: float, *, cut: bool) -> None:
        results, began = self._bench.results, self.sessions.all[-1]["began"]
        lost = lost_seconds(results, began, ended, resumed=len(self.sessions.all) > 1, cut=cut)
        if cut and (folder := cut_experiment(results)) is not None:
            shutil.rmtree(folder)
        self.sessions.end(how, ended, lost_seconds=lost)

    def counts(self) -> dict[str, Any]:
        rows = experiments(self._bench.results)
        out_of_memory = sum(row["out_of_memory"] for row in rows)
        failed = sum(row["error"] is not None for row in rows) - out_of_memory
        return {"trials": len(rows), "out_of_memory": out_of_memory, "failed": failed, "tried": rows}

    def choice(self) -> Choice | None:
        won = winner(self._bench.results, experiments(self._bench.results))
        if won is None:
            return None
        config, base = trial_of(won["ds_config"], self._bench.machine.device)
        return Choice(config=config, base_ds_config=base, said=won)


class DsTune:
    """ds-tune, which resumes its study.

    Args:
        options: of its command line; asked for when the search begins.
    """

    def __init__(
        self, name: str, preset: str, trials: int, options: Callable[[], list[str]], bench: Bench, sessions: Sessions
    ) -> None:
        self.name = name
        self.folder = bench.folder.with_name(name)
        self.sessions = sessions
        self._words = ["--trials", str(trials), "--preset", preset, "--no-verify", "--results", str(self.folder)]
        self._options = options
        self._bench = bench

    def tune(self) -> None:
        log = self.folder.with_suffix(".log")
        environment = self._bench.environment()
        self.folder.mkdir(exist_ok=True)
        command = [sys.executable, "-P", "-m", "ds_tune.tuner", *self._words, *self._options()]
        with session(self, command) as ending:
            status = run_alone(command, self.folder, environment, log, NO_LIMIT_SECONDS, grace_seconds=GRACE_SECONDS)
            ending.how = f"ended with status {status}"
        if status not in (0, 3):  # 3: nothing fits, which is a result
            raise EnvironmentFault(f"{self.name} {self.sessions.all[-1]['how']}:\n{tail(log)}")
        self.sessions.finish()

    def settle(self, how: str, ended: float, *, cut: bool) -> None:
        self.sessions.end(how, ended)

    def _summary(self) -> StudySummary | None:
        results = ResultsFolder(self.folder)
        try:
            return StudyStore.load(results.storage_url, None).summary() if results.database.exists() else None
        except UsageError:  # it was killed before it had written anything
            return None

    def counts(self) -> dict[str, Any]:
        summary = self._summary()
        outcomes = [record.outcome for record in summary.records] if summary else []
        failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
        out_of_memory = sum(failure.kind is FailureKind.OUT_OF_MEMORY for failure in failures)
        return {
            "trials": len(outcomes),
            "out_of_memory": out_of_memory,
            "failed": len(failures) - out_of_memory,
            "tried": study_document(Report.of(summary))["trials"] if summary else [],
        }

    def choice(self) -> Choice | None:
        summary = self._summary()
        if summary is None or summary.best is None:
            return None
        said = {"samples_per_second": summary.best.samples_per_second, "ended": summary.ended}
        return Choice(config=summary.best.config, base_ds_config={}, said=said)


@dataclasses.dataclass(slots=True)
class Ending:
    """How a session ended, as far as it is known."""

    how: str = "cut"


@contextlib.contextmanager
def session(contestant: Contestant, command: Sequence[str]) -> Iterator[Ending]:
    """A stretch of tuning: its end is recorded however it comes, now or by the next call."""
    close_left_open(contestant)
    contestant.sessions.begin(command)
    ending = Ending()
    try:
        yield ending
    finally:
        contestant.settle(ending.how, time.time(), cut=ending.how == "cut")


def close_left_open(contestant: Contestant) -> None:
    if contestant.sessions.is_open:
        ended = last_written(contestant.folder, contestant.sessions.all[-1]["began"])
        contestant.settle("killed", ended, cut=True)
