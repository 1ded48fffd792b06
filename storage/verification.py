"""What the repeated runs of a finalist, each in processes of its own, say together."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

from objectives.trial import Measurement

RUN_NOISE = 0.005
"""Relative standard deviation between two runs of one configuration that their own steps don't show: repeats on one
machine lie within 1 to 2% of each other. Assumed at least, because two or three runs can only show more."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedRate:
    """The mean of a configuration's verification runs, in logarithms so that ratios are differences."""

    log_rate: float
    log_variance: float
    """Of `log_rate`: what the steps of each run and the differences between runs leave open."""
    runs: int
    peak_memory_bytes: int

    @property
    def samples_per_second(self) -> float:
        return math.exp(self.log_rate)

    @property
    def samples_per_second_ci95(self) -> tuple[float, float]:
        half = 1.96 * math.sqrt(self.log_variance)
        return (math.exp(self.log_rate - half), math.exp(self.log_rate + half))

    def is_faster_than(self, other: "VerifiedRate") -> bool:
        """Whether the difference is settled: one-sided p ≤ 0.01."""
        spread = math.sqrt(self.log_variance + other.log_variance)
        return self.log_rate - other.log_rate > statistics.NormalDist().inv_cdf(0.99) * spread


def verified_rate(runs: Sequence[Measurement], search: Measurement) -> VerifiedRate:
    """Combines the verification runs of one configuration; there is at least one.

    Args:
        search: its measurement in the search. It is no part of the mean, for it was picked for being high, but it is
            one more run to see from how far runs of this configuration lie apart on this machine.
    """
    log_rates = [math.log(run.samples_per_second) for run in runs]
    within = [
        ((run.samples_per_second_ci95[1] - run.samples_per_second_ci95[0]) / run.samples_per_second / 2 / 1.96) ** 2
        for run in runs
    ]
    assumed = RUN_NOISE**2 + statistics.fmean(within)
    seen = statistics.variance([*log_rates, math.log(search.samples_per_second)])
    return VerifiedRate(
        log_rate=statistics.fmean(log_rates),
        log_variance=max(assumed, seen) / len(runs),
        runs=len(runs),
        peak_memory_bytes=max(run.peak_memory_bytes for run in runs),
    )
