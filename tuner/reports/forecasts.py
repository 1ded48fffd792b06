"""How wrong the cost model was: its forecast of each trial against what the trial then did."""

import dataclasses
import statistics
from collections.abc import Sequence

from ds_tune.objectives.trial import Measurement
from ds_tune.storage.records import StudySummary


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ForecastErrors:
    """Relative errors of the forecasts of one study, as fractions of what was measured."""

    trials: int
    rate_median: float
    rate_worst: float
    memory_median: float
    memory_worst: float
    last_rates: Sequence[float]
    """Signed errors of samples/s in the order of the trials: the model learns as they come."""


def forecast_errors(summary: StudySummary) -> ForecastErrors | None:
    """Errors of the forecasts of a study's measured trials; None where nothing was forecast."""
    rates, peaks = [], []
    for record in summary.records:
        if record.forecast is None or not isinstance(record.outcome, Measurement):
            continue
        rates.append(record.forecast.samples_per_second / record.outcome.samples_per_second - 1)
        if not record.outcome.from_micro_steps:  # else it never came to the optimizer step
            peaks.append(record.forecast.peak_memory_bytes / record.outcome.peak_memory_bytes - 1)
    if not rates:
        return None
    return ForecastErrors(
        trials=len(rates),
        rate_median=statistics.median(map(abs, rates)),
        rate_worst=max(map(abs, rates)),
        memory_median=statistics.median(map(abs, peaks)) if peaks else 0.0,
        memory_worst=max(map(abs, peaks), default=0.0),
        last_rates=tuple(rates),
    )
