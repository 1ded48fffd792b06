"""A `StudySummary` with what is derived from it for people, computed once for all forms it is told in."""

import dataclasses
import functools
from typing import Self

from ds_tune.storage.records import StudySummary, TrialRecord
from ds_tune.tuner.reports.explanation import explanation_lines
from ds_tune.tuner.reports.forecasts import ForecastErrors, forecast_errors


@dataclasses.dataclass(frozen=True)
class Report:
    """The source of the console's tables, summary.md, summary.txt, JSON, CSV and notes."""

    summary: StudySummary

    @classmethod
    def of(cls, summary: StudySummary) -> Self:
        return cls(summary)

    @functools.cached_property
    def explanation(self) -> list[str]:
        """Sentences on why the best is as fast as it is, and what would make it faster."""
        return explanation_lines(self.summary)

    @functools.cached_property
    def forecast_errors(self) -> ForecastErrors | None:
        """How wrong the cost model's forecasts were; None where nothing was forecast."""
        return forecast_errors(self.summary)

    @functools.cached_property
    def stages(self) -> list[tuple[str, int, TrialRecord | None]]:
        """DeepSpeed's table of tuning spaces: for each ZeRO stage its name, its number of trials and the best of them,
        then the same of all stages."""
        rows = [(f"z{stage}", count, best) for stage, (count, best) in self.summary.best_of_stage().items()]
        return [*rows, ("global", len(self.summary.records), self.summary.best)]
