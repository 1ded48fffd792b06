"""The comparison's run: sweeps, studies, then all choices in fresh processes, from wherever an earlier run left it."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from ds_tune.objectives.cost_model.knob_context import knob_context_of
from ds_tune.objectives.errors import EnvironmentFault, UsageError
from ds_tune.objectives.machine import Machine
from ds_tune.objectives.running.deepspeed_objective import DeepSpeedObjective
from ds_tune.objectives.running.launcher import Launcher
from ds_tune.objectives.running.launchers import DEFAULT_LAUNCHER, LAUNCHERS
from ds_tune.objectives.running.rank_group import ignore
from ds_tune.objectives.timing.step_plan import PRECISE, StepPlan
from ds_tune.objectives.trial import Failure, Measurement, Outcome, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.storage.database import storage_faults
from ds_tune.storage.layout import ResultsFolder
from ds_tune.storage.records import AfterSearch, StudyState, StudySummary
from ds_tune.storage.study_store import StudyStore
from ds_tune.tuner.backend import measured
from ds_tune.tuner.comparison.ledger import Ledger, Swept
from ds_tune.tuner.comparison.request import CompareRequest
from ds_tune.tuner.comparison.rows import (
    Batch,
    Choice,
    Row,
    base_of_row,
    configuration_words,
    workload_of_row,
)
from ds_tune.tuner.comparison.sweep import Sweep, failure_words, fastest_first
from ds_tune.tuner.dimensions import zero_stages
from ds_tune.tuner.limits import Limits
from ds_tune.tuner.observer import Observer
from ds_tune.tuner.reports.export import export
from ds_tune.tuner.reports.report import Report
from ds_tune.tuner.spec import make_spec
from ds_tune.tuner.stopping import StopSignals
from ds_tune.tuner.study import run_study

MakeObserver: TypeAlias = Callable[[], contextlib.AbstractContextManager[Observer]]
"""Makes the observer of one study, which shows it while it is entered."""


class ModelComparison:
    """Everything that is compared for one model."""

    def __init__(
        self, model: str, request: CompareRequest, ledger: Ledger, say: Callable[[str], None] = ignore
    ) -> None:
        """
        Args:
            say: told in one line what takes a while.

        Raises:
            UsageError: the model cannot be trained as asked.
        """
        self.model = model
        self.request = request
        self.ledger = ledger
        self.backend = request.backend_of(model, say)
        workload = self.backend.workload
        assert isinstance(workload, HuggingFaceWorkload)
        self.workload = workload
        self.machine: Machine = self.backend.machine
        self._studies: dict[tuple[Row, Batch], StudySummary] = {}
        ranks, asked = self.machine.ranks, request.global_batch
        if asked is not None and asked % ranks:
            raise UsageError(f"`global_batch={asked}` must be a multiple of the {ranks} ranks")

    @property
    def one_batch(self) -> int | None:
        """Global batch of the second table; None as long as it is not known."""
        return self.request.global_batch or self.ledger.one_batch(self.model)

    def limits(self, batch: Batch) -> Limits:
        """Bounds of a sweep's batch sizes."""
        if batch is Batch.FREE:
            return self.backend.limits
        assert self.one_batch is not None
        return dataclasses.replace(self.backend.limits, global_batch=self.one_batch)

    def known(self, row: Row) -> dict[str, Outcome]:
        """Outcomes of a row's runs so far, by the configuration's name."""
        return {name: run.outcome for name, run in self.ledger.swept(self.model, row).items()}

    def path(self, row: Row, batch: Batch) -> list[TrialConfig]:
        """Configurations of a sweep, up to the first one that has not run."""
        known = self.known(row)
        if row is Row.OWN:
            config = self.backend.own
            return [] if config is None or self.own_fault(batch) else [config]
        if batch is Batch.ONE and self.one_batch is None:
            return []
        return self._sweep(row, batch).path(known)

    def own_fault(self, batch: Batch) -> str | None:
        """Why the person's own configuration is not in a table; None where it is."""
        config = self.backend.own
        if config is None:
            return "its file says nothing of ZeRO stage and batch sizes"
        samples = config.global_batch_size(self.machine.ranks)
        if batch is Batch.ONE and samples != self.one_batch:
            return f"its global batch is {samples}"
        return None

    def _sweep(self, row: Row, batch: Batch) -> Sweep:
        context = knob_context_of(self.workload, self.machine)
        stages = (0,) if row is Row.VANILLA else zero_stages(context)
        return Sweep(stages=stages, limits=self.limits(batch))

    def next_of_sweep(self, row: Row, batch: Batch) -> TrialConfig | None:
        """The configuration that a sweep runs next; None when it is done."""
        path, known = self.path(row, batch), self.known(row)
        return path[-1] if path and path[-1].name not in known else None

    def study(self, row: Row, batch: Batch) -> StudySummary | None:
        """State of a row's study; None before it has begun."""
        if (row, batch) not in self._studies:
            results = ResultsFolder(self.request.folder(self.model, row, batch))
            if not results.database.exists():
                return None
            try:
                summary = StudyStore.load(results.storage_url, self.request.request.study).summary()
            except UsageError:  # killed while it was made
                return None
            self._studies[row, batch] = summary
        return self._studies[row, batch]

    def study_ran(self, row: Row, batch: Batch) -> None:
        """Says that a row's study has gone on, so that it is read anew."""
        self._studies.pop((row, batch), None)

    def is_searched(self, row: Row, batch: Batch) -> bool:
        """Whether the search of a row is over."""
        if not row.is_study:
            return self.next_of_sweep(row, batch) is None
        summary = self.study(row, batch)
        if summary is None or summary.state is StudyState.UNFINISHED:
            return False
        wanted = self.request.speed_trials if row is Row.SPEED else self.request.request.trials
        if summary.finished_trials < wanted and summary.ended is None:
            return False
        unverified = summary.after_search is AfterSearch.NONE and summary.state is StudyState.FINISHED
        return not (unverified and self.request.request.verify) and not summary.goes_on

    def ranked(self, row: Row, batch: Batch) -> list[Choice]:
        """What a row may train with, the best first."""
        base = base_of_row(row, self.workload)
        if not row.is_study:
            pairs = fastest_first(self.path(row, batch), self.known(row))
            return [Choice(row=row, config=config, search=outcome, base=base) for config, outcome in pairs]
        summary = self.study(row, batch)
        if summary is None:
            return []
        best = summary.best
        name = best.config.name if best is not None else None
        records = sorted(summary.eligible, key=lambda record: (record.config.name != name, -summary.rate(record)))
        return [
            Choice(row=row, config=record.config, search=record.outcome, base=base)
            for record in records
            if isinstance(record.outcome, Measurement)
        ]

    def choice(self, row: Row, batch: Batch) -> Choice | None:
        """What a row trains with: the best that did not fail in fresh processes."""
        verified = self.ledger.verified(self.model)
        for choice in self.ranked(row, batch):
            if not any(isinstance(outcome, Failure) for outcome in verified.get(choice.key, {}).values()):
                return choice
        return None

    def choices(self) -> dict[str, Choice]:
        """What runs again, by key: the choices of both tables, each once."""
        found = [self.choice(row, batch) for batch in self.request.batches for row in self.request.rows]
        choices: dict[str, Choice] = {}
        for choice in found:
            if choice is not None:
                choices.setdefault(choice.key, choice)
        return choices

    def next_verification(self) -> tuple[int, Choice] | None:
        """The round and the choice to run next; None when all have run. Every other round is turned, so that a drift of
        the machine favours none."""
        choices, verified = self.choices(), self.ledger.verified(self.model)
        for turn in range(self.request.rounds):
            for key in list(choices)[:: -1 if turn % 2 else 1]:
                if turn not in verified.get(key, {}):
                    return turn, choices[key]
        return None

    @property
    def is_searched_out(self) -> bool:
        """Whether all searches are over."""
        if Batch.ONE in self.request.batches and self.one_batch is None:
            return False
        return all(self.is_searched(row, batch) for batch in self.request.batches for row in self.request.rows)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to run."""
        return self.is_searched_out and self.next_verification() is None


class Runner:
    """Runs what is left of a model's comparison."""

    def __init__(
        self,
        comparison: ModelComparison,
        make_observer: MakeObserver,
        say: Callable[[str], None],
        stop: StopSignals,
        write: Callable[[], object],
    ) -> None:
        """
        Args:
            say: told in one line what runs and what came of it.
            write: called when there is something new to write down.
        """
        self._of = comparison
        self._make_observer = make_observer
        self._say, self._stop, self._write = say, stop, write
        self._told: set[str] = set()

    def run(self) -> None:
        """Until all is done, or it is told to stop.

        Raises:
            UsageError: see `run_study`.
            StopNow: told to stop at once; everything finished is stored.
        """
        with LAUNCHERS[DEFAULT_LAUNCHER](self._of.machine) as launcher:
            self._run(launcher)

    def _run(self, launcher: Launcher) -> None:
        of = self._of
        for batch in of.request.batches:
            if batch is Batch.ONE and not self._fix_one_batch():
                return
            for row in of.request.rows:
                if self._stop.requested:
                    return
                if not of.is_searched(row, batch):
                    if row.is_study:
                        self._run_study(row, batch)
                    else:
                        self._sweep(launcher, row, batch)
                    self._write()
        if not self._stop.requested:
            self._verify(launcher)

    def _fix_one_batch(self) -> bool:
        """Decides the second table's global batch: the one asked for, else that of the first row that runs, tuned by
        hand where it does."""
        of = self._of
        if of.one_batch is None:
            for row in (Row.HAND_TUNED, Row.VANILLA, Row.CORE, Row.SPEED):
                if ranked := of.ranked(row, Batch.FREE):
                    of.ledger.set_one_batch(of.model, ranked[0].config.global_batch_size(of.machine.ranks))
                    break
        return of.one_batch is not None

    def _sweep(self, launcher: Launcher, row: Row, batch: Batch) -> None:
        of = self._of
        self._say(f"{of.model}: {row.words}")
        folder = of.request.folder(of.model, row)
        with self._objective(launcher, row, folder, StepPlan(), fresh_ranks=False) as objective:
            while not self._stop.requested and (config := of.next_of_sweep(row, batch)) is not None:
                began = time.monotonic()
                outcome = self._outcome(objective, config, folder / config.name)
                seconds = time.monotonic() - began
                of.ledger.add_swept(of.model, row, Swept(config=config, outcome=outcome, seconds=seconds))
                self._say(f"     {configuration_words(row, config)}: {outcome_words(outcome)}")

    def _verify(self, launcher: Launcher) -> None:
        of = self._of
        while not self._stop.requested and (turn := of.next_verification()) is not None:
            number, choice = turn
            folder = of.request.folder(of.model, choice.row) / "verification"
            with self._objective(launcher, choice.row, folder, PRECISE, fresh_ranks=True) as objective:
                outcome = self._outcome(objective, choice.config, folder / choice.config.name)
            of.ledger.add_verified(of.model, choice.key, number, outcome)
            words = configuration_words(choice.row, choice.config)
            self._say(
                f"     {choice.row.trainer} {words} again, in fresh processes ({number + 1} of {of.request.rounds}): "
                f"{outcome_words(outcome)}"
            )
            self._write()

    @contextlib.contextmanager
    def _objective(
        self, launcher: Launcher, row: Row, folder: Path, plan: StepPlan, *, fresh_ranks: bool
    ) -> Iterator[DeepSpeedObjective]:
        of = self._of
        objective = DeepSpeedObjective(
            workload_of_row(row, of.workload),
            of.machine,
            launcher=launcher,
            log_folder=(folder / "processes").resolve(),
            trial_seconds=of.request.request.trial_seconds,
            plan=plan,
            fresh_ranks=fresh_ranks,
            trainer=row.trainer,
            notice=self._say,
        )
        try:
            yield objective
        finally:
            objective.close()

    @staticmethod
    def _outcome(objective: DeepSpeedObjective, config: TrialConfig, folder: Path) -> Outcome:
        folder.mkdir(parents=True, exist_ok=True)
        return objective.run(config, folder, ignore)

    def _run_study(self, row: Row, batch: Batch) -> None:
        of = self._of
        at = f", at a global batch of {of.one_batch}" if batch is Batch.ONE else ""
        self._say(f"{of.model}: {row.words}{at}")
        request = of.request.study(of.model, row, batch, of.one_batch)
        try:
            backend = measured(request, self._say)
            spec = make_spec(request, dataclasses.replace(backend, notes=self._new(backend.notes)))
        except UsageError as error:
            if batch is Batch.FREE:
                raise
            # Own micro-batches need not make the others' global batch.
            self._say(f"{of.model}: {row.words} left out: {error}")
            of.ledger.set_fault(of.model, row, batch, str(error))
            return
        fault: str | None = None
        with storage_faults(spec.storage_url):
            try:
                with self._make_observer() as observer:
                    run_study(spec, observer, self._stop)
            except EnvironmentFault as error:  # one row that cannot be had leaves the others
                fault = str(error).splitlines()[0].rstrip(":;")
                self._say(f"{of.model}: {row.words} left out: {fault}")
            finally:
                of.study_ran(row, batch)
            of.ledger.set_fault(of.model, row, batch, fault)
            if fault is not None:
                return
            export(Report.of(StudyStore.load(spec.storage_url, request.study).summary()), spec.results)

    def _new(self, notes: Sequence[str]) -> list[str]:
        """Notes that were not told yet."""
        found = [note for note in notes if note not in self._told]
        self._told.update(found)
        return found


def outcome_words(outcome: Outcome) -> str:
    """Samples per second, or why there are none."""
    if isinstance(outcome, Measurement):
        return f"{outcome.samples_per_second:.2f} samples/s"
    return failure_words(outcome)
