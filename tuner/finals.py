"""What comes behind the search: who really is the fastest, whether it trains what it should, and why it is fast."""

import dataclasses
import datetime
import math
import time
from collections.abc import Callable

from ds_tune.objectives.numerics import LossCurve, NumericsCheck
from ds_tune.objectives.objective import Objective, TrainingObjective
from ds_tune.objectives.trial import CORE_FIELDS, KNOBS, Failure, FailureKind, Measurement, Outcome, TrialConfig
from ds_tune.storage.ablations import Ablation, Contributions
from ds_tune.storage.finalists import RUN_NOISE, Finalist, log_rate, undisturbed_log_rate
from ds_tune.storage.layout import ResultsFolder
from ds_tune.storage.records import Source, StudyState, StudySummary, TrialRecord
from ds_tune.storage.study_store import StudyStore
from ds_tune.tuner.observer import Observer
from ds_tune.tuner.reports.notes import save_trial_note
from ds_tune.tuner.space import Space
from ds_tune.tuner.stopping import StopSignals
from ds_tune.tuner.verification import judge, next_runs

COMPARED_ACCUMULATION = 2
"""More micro-steps a step show nothing that two do not; the comparison is spared them."""

MIN_ABLATION_SECONDS = 20.0
ABLATION_SHARE = 0.5
"""Of the time that the search took: so much may be spent on saying why its winner is fast."""

AS_UNTUNED = "nothing in it can change the numbers: only its batch sizes are not the baseline's"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Who runs the finalists again."""

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
        self.ran = False
        """Whether anything was left to run."""
        self._store = store
        self._results = results
        self._verification = verification
        self._observer = observer
        self._stop = stop

    def run(self) -> None:
        """Until there is a winner that trains what the baseline trains, and its explanation, or nobody is left."""
        failed: set[str] = set()
        while not self._stop.requested:
            summary = self._store.summary()
            if summary.state is StudyState.UNFINISHED or summary.fastest is None:
                return
            if summary.winner is not None:
                if self._ablate(summary):
                    continue
                return
            turn = next_runs(summary, frozenset(failed))
            if turn:
                self._run_again(turn, summary, failed)
                continue
            verdict = judge(summary, frozenset(failed))
            if verdict is None:
                return
            [leader] = [record for record in summary.records if record.config.name == verdict.leader]
            if verdict.leader in summary.numerics:  # and without a fault, or it would be no candidate
                self._store.set_winner(verdict.leader, verdict.level, verdict.unsettled)
                continue
            self._check_numerics(leader, summary)

    def _run_again(self, turn: list[TrialRecord], summary: StudySummary, failed: set[str]) -> None:
        """One round of verification; who does not run again is put into `failed`."""
        fresh = self._verification.fresh
        try:
            for record in turn:
                if self._stop.requested:
                    return
                self.ran = True
                self._observer.verification_started(record, summary)
                folder = self._results.verification(record.config)
                folder.mkdir(parents=True, exist_ok=True)
                outcome = fresh.run(record.config, folder, self._observer.phase)
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
        curve = self._losses(record, config, summary)
        if isinstance(curve, Failure):
            return f"its losses could not be had: {curve.message}"
        for reference in references:
            theirs = self._losses(record, reference, summary)
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

    def _losses(self, record: TrialRecord, config: TrialConfig, summary: StudySummary) -> LossCurve | Failure:
        self.ran = True
        self._observer.numerics_started(record, config, summary)
        folder = self._results.numerics(record.config, config)
        folder.mkdir(parents=True, exist_ok=True)
        return self._verification.training.losses(config, folder, self._observer.phase)

    def _ablate(self, summary: StudySummary) -> bool:
        """Runs the winner without each of its settings in turn, as far as the study's trials do not tell.

        Returns:
            Whether one of these was faster and is a finalist now, so that there is no winner any more.
        """
        winner, before = summary.best, summary.contributions
        if winner is None or (before is not None and before.winner == winner.config.name):
            return False
        known = {record.config: record for record in summary.records}
        in_search = winner.samples_per_second or 0.0
        undisturbed = None if summary.disturbance is None else summary.finalists.get(winner.config.name)
        again: float | None = None  # the winner's rate in the processes that the others run in here
        started, affordable = time.monotonic(), max(MIN_ABLATION_SECONDS, ABLATION_SHARE * summary.tuning_seconds)
        ablations, missing = [], False
        try:
            for field, config in ablated(winner.config, summary, self._legal.__contains__):
                if config in known:
                    outcome, against = beside(known[config], winner, summary)
                else:
                    missing = time.monotonic() - started >= affordable
                    if missing:
                        break
                    if again is None:
                        rerun = self._run_ablation(winner, winner.config, summary)
                        again = rerun.samples_per_second if isinstance(rerun, Measurement) else in_search
                    if self._stop.requested:
                        return False
                    outcome, against = self._run_ablation(winner, config, summary, best_samples_per_second=again), again
                    if is_faster(outcome, against, undisturbed):
                        self._add_finalist(config, outcome, summary)
                        return True
                ablations.append(Ablation.of(field, config, outcome, winner_samples_per_second=against))
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
        *,
        best_samples_per_second: float | None = None,
    ) -> Outcome:
        """One warm run; what is much slower than the best is given up early, as in the search."""
        self.ran = True
        self._observer.ablation_started(winner, config, summary)
        folder = self._results.ablation(winner.config, config)
        folder.mkdir(parents=True, exist_ok=True)
        return self._verification.training.run(
            config, folder, self._observer.phase, best_samples_per_second=best_samples_per_second
        )


def ablated(
    winner: TrialConfig, summary: StudySummary, is_legal: Callable[[TrialConfig], bool]
) -> list[tuple[str, TrialConfig]]:
    """The winner less each of its settings: a knob off, or stage or batch sizes as the baseline has them.

    What the study could not have proposed is left out, such as another batch size where the global batch is fixed.
    """
    changes: list[tuple[str, int | str]] = [(field, KNOBS[field].off) for field in winner.knobs_on]
    if summary.baseline is not None:
        for field in CORE_FIELDS:
            value = getattr(summary.baseline.config, field)
            if value != getattr(winner, field):
                changes.append((field, value))
    configs = [(field, TrialConfig.from_json({**winner.to_json(), field: value})) for field, value in changes]
    return [(field, config) for field, config in configs if is_legal(config)]


def is_faster(outcome: Outcome, winner_samples_per_second: float, undisturbed: Finalist | None) -> bool:
    """Whether an ablation beat the winner by more than two runs of one configuration differ by.

    Args:
        undisturbed: the winner's runs where something else uses the machine: then the fastest steps are compared.
    """
    if not isinstance(outcome, Measurement) or outcome.stopped_early:
        return False
    ahead = log_rate(outcome) - math.log(winner_samples_per_second)
    if undisturbed is not None:
        ahead = undisturbed_log_rate(outcome) - max(map(undisturbed_log_rate, undisturbed.all_runs))
    return ahead > 2 * RUN_NOISE


def beside(record: TrialRecord, winner: TrialRecord, summary: StudySummary) -> tuple[Outcome, float]:
    """What a trial's configuration did, and the winner's samples/s beside it: both as verified, where both were."""
    outcome, ours, theirs = record.outcome, summary.verified(winner), summary.verified(record)
    if ours is None or theirs is None or not isinstance(outcome, Measurement):
        return outcome, winner.samples_per_second or 0.0
    return dataclasses.replace(outcome, samples_per_second=theirs.samples_per_second), ours.samples_per_second


def compared(winner: TrialConfig, summary: StudySummary) -> tuple[TrialConfig, list[TrialConfig]]:
    """What of a configuration is compared, and with what: untuned, on the same samples a step.

    Returns:
        The configuration with no more micro-steps than show everything; and the references in the order to try them,
        each smaller than the one before it. None where the configuration is itself untuned. What was allowed to change
        the numbers is in the references, too, and so is what the baseline needs to fit.
    """
    baseline = summary.baseline
    stage = baseline.config.zero_stage if baseline is not None else winner.zero_stage
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
