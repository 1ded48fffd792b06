"""Figures of a comparison's rows, derived from its runs whenever they are needed."""

import dataclasses
import math
from collections.abc import Sequence

from ds_tune.objectives.metric import METRICS, all_metrics, metric_context
from ds_tune.objectives.trial import Failure, FailureKind, TrialConfig
from ds_tune.storage.finalists import (
    Finalist,
    Speedup,
    VerifiedRate,
    disturbed_run_noise,
    is_busy,
    step_spread,
    verified_rate,
)
from ds_tune.storage.records import StudyState
from ds_tune.tuner.comparison.request import CompareRequest
from ds_tune.tuner.comparison.rows import Batch, Choice, Row
from ds_tune.tuner.comparison.runner import ModelComparison
from ds_tune.tuner.comparison.sweep import failure_words


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What it took to find a row's configuration."""

    seconds: float
    """Search alone."""
    total_seconds: float
    """With the study's own verification, comparison of losses and ablations."""
    experiments: int
    out_of_memory: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RowFigures:
    """One row of one table of one model."""

    model: str
    batch: Batch
    row: Row
    search: Search
    config: TrialConfig | None = None
    """None where nothing of the row runs, or nothing has run yet."""
    reason: str | None = None
    """Why there is no figure; None where there is one."""
    is_runnable: bool | None = None
    """None as long as it is not known."""
    global_batch: int | None = None
    rate: VerifiedRate | None = None
    peak_memory_bytes: int | None = None
    """The highest of any rank in any run in fresh processes."""
    metrics: dict[str, float | None] = dataclasses.field(default_factory=dict)
    """Every metric at the verified rate, by its name."""
    over_vanilla: Speedup | None = None
    over_hand_tuned: Speedup | None = None
    disturbance: float | None = None
    """Relative difference between slow and fast steps of one configuration where something else used the machine."""


@dataclasses.dataclass(frozen=True, slots=True)
class Figures:
    """All rows of a comparison."""

    request: CompareRequest
    models: Sequence[ModelComparison]
    rows: Sequence[RowFigures]

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to run."""
        return all(each.is_complete for each in self.models)

    def of_studies(self, model: str) -> list[RowFigures]:
        """Rows of a model that a study has found."""
        return [row for row in self.rows if row.model == model and row.row.is_study]

    def of(self, model: str, batch: Batch) -> list[RowFigures]:
        """Rows of one table of a model, in their order."""
        return [row for row in self.rows if (row.model, row.batch) == (model, batch)]


def figures_of(request: CompareRequest, models: Sequence[ModelComparison]) -> Figures:
    """Figures of all that has run so far."""
    rows = [row for each in models for batch in request.batches for row in _table(each, batch)]
    return Figures(request, models, rows)


def _table(of: ModelComparison, batch: Batch) -> list[RowFigures]:
    # What both tables' choices show of the machine counts for each of them.
    finalists = {
        key: Finalist(choice.search, runs)
        for key, choice in of.choices().items()
        if (runs := of.ledger.measured(of.model, key))
    }
    everybody = list(finalists.values())
    is_disturbed = is_busy(everybody)
    noise = disturbed_run_noise(everybody) if is_disturbed else None
    disturbance = max(step_spread(each.all_runs) for each in everybody) if is_disturbed else None
    rates = {
        key: verified_rate(each, [other for other in everybody if other is not each], run_noise=noise)
        for key, each in finalists.items()
    }
    found = {row: _row(of, row, batch, rates, disturbance) for row in of.request.rows}
    bases = {row: found[row].rate for row in (Row.VANILLA, Row.HAND_TUNED)}
    return [
        dataclasses.replace(
            figures,
            over_vanilla=_over(figures, bases[Row.VANILLA], row is Row.VANILLA),
            over_hand_tuned=_over(figures, bases[Row.HAND_TUNED], row is Row.HAND_TUNED),
        )
        for row, figures in found.items()
    ]


def _over(figures: RowFigures, base: VerifiedRate | None, is_itself: bool) -> Speedup | None:
    if figures.rate is None or base is None:
        return None
    return Speedup(factor=1.0, ci95=(1.0, 1.0)) if is_itself else Speedup.of(figures.rate, base)


def _row(
    of: ModelComparison, row: Row, batch: Batch, rates: dict[str, VerifiedRate], disturbance: float | None
) -> RowFigures:
    choice, search = of.choice(row, batch), search_of(of, row, batch)
    if choice is None:
        over = (batch is Batch.FREE or of.one_batch is not None) and of.is_searched(row, batch)
        return RowFigures(
            model=of.model,
            batch=batch,
            row=row,
            search=search,
            is_runnable=False if over else None,
            reason=fault_of(of, row, batch) if over else of.ledger.fault(of.model, row, batch) or "not searched yet",
        )
    runs, rate = of.ledger.measured(of.model, choice.key), rates.get(choice.key)
    context = metric_context(of.workload, of.machine, choice.search.flops_per_sample)
    return RowFigures(
        model=of.model,
        batch=batch,
        row=row,
        search=search,
        config=choice.config,
        reason=None if rate is not None else "not verified yet",
        is_runnable=True,
        global_batch=choice.config.global_batch_size(of.machine.ranks),
        rate=rate,
        peak_memory_bytes=max((run.peak_memory_bytes for run in runs), default=None),
        metrics=all_metrics(rate.samples_per_second, context) if rate is not None else dict.fromkeys(METRICS),
        disturbance=disturbance,
    )


def search_of(of: ModelComparison, row: Row, batch: Batch) -> Search:
    """What a row's search took so far."""
    if row.is_study:
        summary = of.study(row, batch)
        if summary is None:
            return Search(seconds=0.0, total_seconds=0.0, experiments=0, out_of_memory=0)
        outcomes = [record.outcome for record in summary.records]
        seconds, total = summary.tuning_seconds, summary.total_seconds
    else:
        swept = of.ledger.swept(of.model, row)
        runs = [swept[config.name] for config in of.path(row, batch) if config.name in swept]
        outcomes = [run.outcome for run in runs]
        seconds = total = math.fsum(run.seconds for run in runs)
    memory = sum(isinstance(each, Failure) and each.kind is FailureKind.OUT_OF_MEMORY for each in outcomes)
    return Search(seconds=seconds, total_seconds=total, experiments=len(outcomes), out_of_memory=memory)


def fault_of(of: ModelComparison, row: Row, batch: Batch) -> str:
    """Why a row whose search is over trains with nothing, without a full stop."""
    if row is Row.OWN and (fault := of.own_fault(batch)):
        return fault
    if failed := failures_again(of, of.ranked(row, batch)):
        return f"in fresh processes: {failed}"
    if row.is_study:
        summary = of.study(row, batch)
        known = summary is not None and summary.state is StudyState.NOTHING_FITS and summary.ended
        return known or "no configuration ran"
    failures = {
        config: outcome for config in of.path(row, batch) if isinstance(outcome := of.known(row)[config.name], Failure)
    }
    if not failures:
        return "no micro-batch within the limits gives this global batch"
    if any(outcome.kind is not FailureKind.OUT_OF_MEMORY for outcome in failures.values()):
        return next(failure_words(each) for each in failures.values() if each.kind is not FailureKind.OUT_OF_MEMORY)
    stages = " in any ZeRO stage" if row is Row.HAND_TUNED else ""
    size = min(config.micro_batch_size for config in failures)
    return f"out of memory at mbs {size}{stages}"


def failures_again(of: ModelComparison, ranked: Sequence[Choice]) -> str | None:
    """Why the best of a row failed in fresh processes; None where none has."""
    verified = of.ledger.verified(of.model)
    for choice in ranked:
        for outcome in verified.get(choice.key, {}).values():
            if isinstance(outcome, Failure):
                return failure_words(outcome)
    return None
