"""Statistics of step times: warm-up, drift, and the intervals of means, throughputs and speed-ups. Pure arithmetic.

A throughput is always samples of one whole optimizer step over its mean seconds on the slowest rank.
"""

import itertools
import math
import statistics
from collections.abc import Sequence

FEWEST_FOR_WARMUP = 3
"""With two steps, warm-up cannot be told from noise."""

WARMUP_EXCESS = 0.02
"""First steps that are within this of the rest are not called warm-up."""

FEWEST_FOR_CORRELATION = 8
"""The autocorrelation of fewer values is itself little more than noise."""

UNSEEN_FASTER = 0.01
"""Fraction by which the mean of all steps may be below the fastest that was timed. Of four steps all are above their
mean in one case of sixteen, but by so much only where they differ by more."""

UNKNOWN_FACTOR = 2.0
"""Stands for the interval of a single step, which tells nothing of how far steps lie apart."""

ANSWER_FACTOR = 2.0
"""An interval that spans more is not an answer: it is not shown as one."""

# Quantiles of Student's t for 1..30 degrees of freedom (any statistics table): two-sided 95%, and 98% for p = 0.01 on
# one side. Beyond 30 the last is used, which is at most 4% too wide.
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
T98 = (
    31.821, 6.965, 4.541, 3.747, 3.365, 3.143, 2.998, 2.896, 2.821, 2.764,
    2.718, 2.681, 2.650, 2.624, 2.602, 2.583, 2.567, 2.552, 2.539, 2.528,
    2.518, 2.508, 2.500, 2.492, 2.485, 2.479, 2.473, 2.467, 2.462, 2.457,
)  # fmt: skip


def warmup_length(step_seconds: Sequence[float]) -> int:
    """How many of the first steps are not yet steady: at most half of them.

    The truncation point of MSER (White 1997): the one that leaves the mean of the rest with the smallest standard
    error. As that may also cut off good steps by chance, it counts only where those it cuts off were slower.
    """
    count = len(step_seconds)
    if count < FEWEST_FOR_WARMUP:
        return 0

    def squared_error(cut: int) -> float:
        rest = step_seconds[cut:]
        mean = statistics.fmean(rest)
        return math.fsum((value - mean) ** 2 for value in rest) / len(rest) ** 2

    cut = min(range(count // 2 + 1), key=squared_error, default=0)
    if cut and statistics.fmean(step_seconds[:cut]) > (1 + WARMUP_EXCESS) * statistics.fmean(step_seconds[cut:]):
        return cut
    return 0


def is_drifting(values: Sequence[float]) -> bool:
    """Whether the values go up or down over time, by the Mann-Kendall test at p ≤ 0.05 (normal approximation)."""
    count = len(values)
    score = sum(
        (later > earlier) - (later < earlier) for index, earlier in enumerate(values) for later in values[index + 1 :]
    )
    spread = math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    return spread > 0 and (abs(score) - 1) / spread > statistics.NormalDist().inv_cdf(0.975)


def effective_size(values: Sequence[float]) -> float:
    """How many independent values tell as much about the mean: n·(1 - r)/(1 + r), between 3 and n.

    r is the lag-1 autocorrelation with the bias of short series taken out (Kendall 1954), where it is positive.
    """
    count = len(values)
    mean = statistics.fmean(values)
    variance = math.fsum((value - mean) ** 2 for value in values)
    if count < FEWEST_FOR_CORRELATION or variance == 0:
        return float(count)
    lagged = math.fsum((one - mean) * (next_one - mean) for one, next_one in itertools.pairwise(values))
    correlation = (lagged / variance + 1 / count) / (1 - 3 / count)
    correlation = min(max(correlation, 0.0), 0.95)
    return max(count * (1 - correlation) / (1 + correlation), 3.0)


def mean_ci95(values: Sequence[float], *, independent: bool = False) -> tuple[float, float]:
    """The 95% confidence interval of the mean by Student's t; a single value has an unbounded one.

    Args:
        independent: the values are no series. Steps that follow each other resemble each other: of those the interval
            counts `effective_size`.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return (-math.inf, math.inf)
    size = float(len(values)) if independent else effective_size(values)
    half = student_quantile(T95, size) * statistics.stdev(values) / math.sqrt(size)
    return (mean - half, mean + half)


def step_ci95(step_seconds: Sequence[float]) -> tuple[float, float]:
    """The 95% confidence interval of the mean step, bounded by what was seen: see `above_fastest`."""
    return above_fastest(mean_ci95(step_seconds), min(step_seconds))


def above_fastest(ci95: tuple[float, float], fastest_seconds: float) -> tuple[float, float]:
    """The interval of a mean with its lower end raised to the fastest value seen, less `UNSEEN_FASTER`.

    Student's interval of a few values that differ widely reaches below zero, and its reciprocal to any throughput.
    """
    low, high = ci95
    return (max(low, (1 - UNSEEN_FASTER) * fastest_seconds), high) if math.isfinite(low) else ci95


def student_quantile(table: Sequence[float], size: float) -> float:
    """Student's quantile for `size - 1` degrees of freedom, rounded down to be on the safe side."""
    freedom = max(size - 1, 1.0)
    return table[math.floor(freedom) - 1] if freedom <= len(table) else table[-1]


def throughput(
    step_seconds: Sequence[float], samples_per_step: int, ci95: tuple[float, float] | None = None
) -> tuple[float, tuple[float, float]]:
    """Samples per second and its 95% interval, from the seconds of whole optimizer steps.

    The interval is the reciprocal of that of the mean step time: exact at its ends, as 1/x is monotone. A single step
    has none; `UNKNOWN_FACTOR` to either side stands for it.

    Args:
        ci95: of the mean step, where more is known than these steps tell.

    Raises:
        ValueError: there is no step to speak of.
    """
    if not step_seconds:
        raise ValueError("no optimizer step was timed")
    rate = samples_per_step / statistics.fmean(step_seconds)
    low, high = step_ci95(step_seconds) if ci95 is None else ci95
    if not math.isfinite(high):
        return rate, (rate / UNKNOWN_FACTOR, rate * UNKNOWN_FACTOR)
    return rate, (samples_per_step / high, samples_per_step / low)


def speedup_ci95(
    rate: float, rate_ci95: tuple[float, float], base: float, base_ci95: tuple[float, float]
) -> tuple[float, tuple[float, float]]:
    """How many times faster `rate` is than `base`, with a 95% interval.

    The half-widths of the two logarithms are combined as independent errors, so that the interval of a ratio is one of
    ratios: it never reaches zero.
    """
    ratio = rate / base
    half = math.hypot(log_half_width(rate, rate_ci95), log_half_width(base, base_ci95))
    return ratio, (ratio * math.exp(-half), ratio * math.exp(half))


def log_half_width(rate: float, ci95: tuple[float, float]) -> float:
    """Half the width of the interval of a rate's logarithm; one that reaches zero counts as far down as up."""
    low, high = ci95
    return math.log(high / low) / 2 if low > 0 else math.log(high / rate)


def is_answer(ci95: tuple[float, float]) -> bool:
    """Whether an interval says enough to be shown as one; see `ANSWER_FACTOR`."""
    low, high = ci95
    return high <= ANSWER_FACTOR * low
