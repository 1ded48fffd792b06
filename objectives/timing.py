"""How many steps a trial runs, and what its step times say: pure arithmetic, no clock and no torch.

A throughput is always samples of one whole optimizer step over its mean seconds on the slowest rank.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence

# Two-sided 95% quantiles of Student's t for 1..30 degrees of freedom (any statistics table); beyond, the normal's.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """How long a trial warms up and how much it times."""

    warmup_steps: int = 2
    zero3_extra_warmup_steps: int = 3
    """Stage 3 records which parameters to prefetch during its first steps, and those are slow."""
    min_timed_steps: int = 5
    max_timed_steps: int = 20
    timed_seconds: float = 8.0
    """Aim for this much timed work, within the two bounds above."""

    def warmup(self, zero_stage: int) -> int:
        return self.warmup_steps + (self.zero3_extra_warmup_steps if zero_stage == 3 else 0)

    def timed(self, last_warmup_seconds: float) -> int:
        """Steps to time, given how long the last warm-up step took on the slowest rank."""
        wanted = math.ceil(self.timed_seconds / max(last_warmup_seconds, 1e-9))
        return min(max(wanted, self.min_timed_steps), self.max_timed_steps)


def mean_ci95(values: Sequence[float]) -> tuple[float, float]:
    """The 95% confidence interval of the mean by Student's t; a single value has an unbounded one."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return (-math.inf, math.inf)
    freedom = len(values) - 1
    quantile = _T95[freedom - 1] if freedom <= len(_T95) else 1.960
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return (mean - half, mean + half)


def throughput(step_seconds: Sequence[float], samples_per_step: int) -> tuple[float, tuple[float, float]]:
    """Samples per second and its 95% interval, from the seconds of whole optimizer steps.

    The interval is the one of the mean step time, turned over: exact at its ends, as 1/x is monotone.

    Raises:
        ValueError: there is no step to speak of.
    """
    if not step_seconds:
        raise ValueError("no optimizer step was timed")
    low, high = mean_ci95(step_seconds)
    rate = samples_per_step / statistics.fmean(step_seconds)
    slowest = samples_per_step / high if math.isfinite(high) else 0.0
    fastest = samples_per_step / low if low > 0 else 2 * rate
    return rate, (slowest, fastest)


def speedup_ci95(
    rate: float, rate_ci95: tuple[float, float], base: float, base_ci95: tuple[float, float]
) -> tuple[float, tuple[float, float]]:
    """How many times faster `rate` is than `base`, with a 95% interval.

    The two half-widths are combined as independent relative errors (first-order propagation for a ratio).
    """
    ratio = rate / base
    relative = math.hypot(
        (rate_ci95[1] - rate_ci95[0]) / 2 / rate,
        (base_ci95[1] - base_ci95[0]) / 2 / base,
    )
    return ratio, (ratio * (1 - relative), ratio * (1 + relative))
