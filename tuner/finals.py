"""After the search: who really is the fastest, whether it trains what it should, and why it is fast."""

import dataclasses
import datetime
import time
from collections.abc import Sequence

from ds_tune.objectives.loss_scale import forgets_loss_scale
from ds_tune.objectives.numerics import LossCurve, NumericsCheck
from ds_tune.objectives.objective import Objective, TrainingObjective
from ds_tune.objectives.trial import KNOBS, Failure, FailureKind, Measurement, Outcome, TrialConfig
from ds_tune.storage.ablations import Contributions
from ds_tune.storage.layout import ResultsFolder
from ds_tune.storage.records import AfterSearch, Source, StudyState, StudySummary, TrialRecord
from ds_tune.storage.study_store import StudyStore
from ds_tune.tuner.ablations import AgainstWinner, ablated, beside, in_one_session
from ds_tune.tuner.observer import Observer
from ds_tune.tuner.reports.notes import save_trial_note
from ds_tune.tuner.space import Space
from ds_tune.tuner.stopping import StopSignals
from ds_tune.tuner.time_left import EXPLANATION_RUNS, RunsLeft
from ds_tune.tuner.verification import next_runs, runs_to_follow

COMPARED_ACCUMULATION = 2
"""More micro-steps a step show nothing that two do not; the comparison is spared them."""

MIN_ABLATION_SECONDS = 20.0
ABLATION_SHARE = 0.5
"""Fraction of the search's time that may be spent on saying why its winner is fast."""

AS_UNTUNED = "not compared, for only its batch sizes differ from the baseline's"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Objectives that run the finalists again."""

    fresh: Objective
    """With nothing that an earlier run could have left."""
    training: TrainingObjective
    """For what is not timed."""


class Finals:
    """Finds and explains the winner of a study whose search is over; where an interruption stopped it, it goes on."""

    def __init__(
        self,
        store: StudyStore,
        results: ResultsFolder,
        verification: Verification,
        observer: Observer,
        stop: StopSignals,
        space: Space,
    ) -> None:
        """
        Args:
            space: what the study could have proposed.
        """
        self._space = space
        self._legal = frozenset(space.legal)
        self._clock = time.monotonic()
        self._ran = False
        self._ablation_seconds = 0.0
        self._store = store
        self._results = results
        self._verification = verification
        self._observer = observer
        self._stop = stop

    def run(self) -> None:
        """Until there is a winner that trains what the baseline trains, and its explanation, or nobody is left."""
        self._clock = time.monotonic()
        try:
            self._run()
        finally:
            if self._ran:
                self._add_seconds()

    def _run(self) -> None:
        failed: set[str] = set()
        while not self._stop.requested:
            summary = self._store.summary()
            if summary.state is not StudyState.FINISHED:
                return
            if summary.finals_seconds is None:
                self._store.add_finals_seconds(0.0)
            if summary.winner is None:
                turn = next_runs(summary, failed)
                if turn:
                    self._run_again(turn, runs_to_follow(summary, failed), failed)
                    continue
                verdict = summary.verdict_without(failed)
                if verdict is None:
                    return
                # Before its losses are compared, so that a verdict once reached is not lost.
                self._store.set_winner(verdict.leader, verdict.level, verdict.unsettled)
                continue
            [winner] = [record for record in summary.records if record.config.name == summary.winner]
            if summary.winner not in summary.numerics:
                self._check_numerics(winner, summary)
            elif summary.numerics_fault(winner) is not None:
                self._store.forget_winner()
            elif not self._ablate(winner, summary):
                return

    def _add_seconds(self) -> None:
        """Stores the time that has passed: after each run, so that a tuner that is killed loses no more than one."""
        now = time.monotonic()
        self._store.add_finals_seconds(now - self._clock)
        self._clock, self._ran = now, True

    def _run_again(self, turn: Sequence[TrialRecord], to_follow: int, failed: set[str]) -> None:
        """One round of verification; who does not run again is put into `failed`."""
        fresh = self._verification.fresh
        try:
            for index, record in enumerate(turn):
                if self._stop.requested:
                    return
                left = RunsLeft(0, len(turn) - index + to_follow, EXPLANATION_RUNS)
                self._observer.verification_started(record, self._store.summary(), left)
                folder = self._results.verification(record.config)
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    outcome = fresh.run(record.config, folder, self._observer.phase)
                finally:
                    self._add_seconds()
                if isinstance(outcome, Measurement):
                    self._store.add_verification(record.config.name, outcome)
                else:
                    failed.add(record.config.name)
                self._observer.verification_finished(record, outcome)
        finally:
            fresh.close()

    def _check_numerics(self, record: TrialRecord, summary: StudySummary) -> None:
        """Compares a configuration's losses with those of untuned training, and stores what they show."""
        try:
            found = self._compare(record, summary)
        finally:
            self._verification.training.close()
        self._store.set_numerics(record.config.name, found)
        self._observer.numerics_finished(record, found)

    def _compare(self, record: TrialRecord, summary: StudySummary) -> NumericsCheck | str:
        config, references = compared(record.config, summary)
        if not references:
            return AS_UNTUNED
        later = len(self._to_ablate(record, summary))
        curve = self._losses(record, config, summary, RunsLeft(explanations=2 + later))
        if isinstance(curve, Failure):
            return f"its losses could not be had: {curve.message}"
        for reference in references:
            theirs = self._losses(record, reference, summary, RunsLeft(explanations=1 + later))
            if isinstance(theirs, LossCurve):
                return NumericsCheck(
                    reference=reference.name,
                    dtype=config.trained_dtype(summary.workload.dtype),
                    curve=curve,
                    reference_curve=theirs,
                )
            why = f"the losses of {reference.name}, to compare with, could not be had: {theirs.message}"
            if theirs.kind is not FailureKind.OUT_OF_MEMORY:
                break
        return why

    def _losses(
        self, record: TrialRecord, config: TrialConfig, summary: StudySummary, left: RunsLeft
    ) -> LossCurve | Failure:
        self._observer.numerics_started(record, config, summary, left)
        folder = self._results.numerics(record.config, config)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return self._verification.training.losses(config, folder, self._observer.phase)
        finally:
            self._add_seconds()

    def _to_ablate(self, winner: TrialRecord, summary: StudySummary) -> list[TrialConfig]:
        """Configurations that explain the winner: itself once more, and those that the study's trials do not tell."""
        known = {record.config for record in summary.records}
        new = [config for _, config in ablated(winner.config, summary, self._legal.__contains__) if config not in known]
        return [winner.config, *new] if new else []

    def _ablate(self, winner: TrialRecord, summary: StudySummary) -> bool:
        """Runs the winner without each of its settings in turn, as far as the study's trials do not tell.

        Returns:
            Whether one of these was faster and is a finalist now, so that there is no winner any more.
        """
        if summary.after_search is AfterSearch.DONE:
            return False
        known = {record.config: record for record in summary.records}
        affordable = max(MIN_ABLATION_SECONDS, ABLATION_SHARE * summary.tuning_seconds)
        left = len(self._to_ablate(winner, summary))
        again: Outcome | None = None  # the winner's run in the processes that the others run in here
        ablations, missing = [], False
        try:
            for field, config in ablated(winner.config, summary, self._legal.__contains__):
                if config in known:
                    compared = beside(known[config], winner, summary)
                    if self._promote(known[config], compared, summary):
                        return True
                else:
                    missing = self._ablation_seconds >= affordable
                    if missing:
                        break
                    if again is None:
                        again = self._run_ablation(winner, winner.config, summary, left)
                    if self._stop.requested:
                        return False
                    left -= 1
                    rate = again.samples_per_second if isinstance(again, Measurement) else winner.samples_per_second
                    outcome = self._run_ablation(winner, config, summary, left, best_samples_per_second=rate)
                    compared = in_one_session(outcome, again, winner, summary)
                    if compared.is_faster:
                        self._add_finalist(config, outcome, summary)
                        return True
                ablations.append(compared.ablation(field, config))
        finally:
            self._verification.training.close()
        self._store.set_contributions(
            Contributions(
                winner=winner.config.name,
                ablations=tuple(ablations),
                importances=self._store.importances() if missing else {},
            )
        )
        return False

    def _promote(self, record: TrialRecord, compared: AgainstWinner, summary: StudySummary) -> bool:
        """Makes a finalist of a trial that was faster beside the winner and did not run again yet."""
        name = record.config.name
        if not compared.is_faster or name in summary.candidates or record not in summary.eligible:
            return False
        # In this order: killed between the two, the study finds its winner and this again.
        self._store.forget_winner()
        self._store.promote(name)
        self._observer.finalist_added(record, self._store.summary())
        return True

    def _add_finalist(self, config: TrialConfig, outcome: Outcome, summary: StudySummary) -> None:
        """Makes a trial of what an ablation found to be faster than the winner, and has it verified."""
        # First of all: killed after it, the study finds its winner and this again; killed before, it would miss this.
        self._store.forget_winner()
        trial = self._store.begin(self._space.params(config), self._space.distributions, Source.ABLATION)
        record = TrialRecord(
            number=trial.number,
            config=config,
            outcome=outcome,
            source=Source.ABLATION,
            started_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            machine=summary.machine,
            versions=summary.versions,
        )
        self._store.save(trial, record)
        self._store.tell(trial, record)
        save_trial_note(self._store.study, record, self._store.provenance)
        self._observer.finalist_added(record, self._store.summary())

    def _run_ablation(
        self,
        winner: TrialRecord,
        config: TrialConfig,
        summary: StudySummary,
        left: int,
        *,
        best_samples_per_second: float | None = None,
    ) -> Outcome:
        """One warm run; what is much slower than the best is given up early, as in the search."""
        self._observer.ablation_started(winner, config, summary, RunsLeft(explanations=left))
        began = time.monotonic()
        folder = self._results.ablation(winner.config, config)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return self._verification.training.run(
                config, folder, self._observer.phase, best_samples_per_second=best_samples_per_second
            )
        finally:
            self._ablation_seconds += time.monotonic() - began
            self._add_seconds()


def compared(winner: TrialConfig, summary: StudySummary) -> tuple[TrialConfig, list[TrialConfig]]:
    """Chooses what of a configuration is compared, and with what: untuned, on the same samples a step.

    Returns:
        The configuration with no more micro-steps than show everything; and the references in the order to try them,
        each smaller than the one before it. None where the configuration is itself untuned. What was allowed to change
        the numbers is in the references, too, and so is what the baseline needs to fit.
    """
    baseline = summary.baseline
    stage = baseline.config.zero_stage if baseline is not None else winner.zero_stage
    if forgets_loss_scale(stage, winner.trained_dtype(summary.workload.dtype)):
        stage = 1  # nothing can be learned from what does not train
    accumulation = min(winner.gradient_accumulation_steps, COMPARED_ACCUMULATION)
    config = dataclasses.replace(winner, gradient_accumulation_steps=accumulation)
    saving = baseline.config.knobs_on if baseline is not None else {}
    changing = {field: value for field, value in winner.knobs_on.items() if KNOBS[field].numerics is not None}
    knobs_kept = {**saving, **changing}
    if "quantized_weights" in knobs_kept:
        stage = winner.zero_stage  # only there are weights gathered, and rounded
    if winner.zero_stage == stage and knobs_kept == winner.knobs_on:
        return config, []
    fitted = [
        record.config.micro_batch_size
        for record in summary.eligible
        if record.config.zero_stage == stage and record.config.knobs_on == saving
    ]
    largest = max(fitted, default=1)
    sizes = [
        size
        for size in range(winner.micro_batch_size, 0, -1)
        if winner.micro_batch_size % size == 0 and (size <= largest or size == 1)
    ]
    samples = winner.micro_batch_size * accumulation
    return config, [
        TrialConfig(zero_stage=stage, micro_batch_size=size, gradient_accumulation_steps=samples // size, **knobs_kept)
        for size in sizes
    ]
