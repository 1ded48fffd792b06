"""Combined results of finalists' repeated runs, each in processes of its own: rates, and which is faster."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Self

from ds_tune.objectives.timing.intervals import (
    T95,
    T98,
    UNSEEN_FASTER,
    is_answer,
    log_half_width,
    speedup_ci95,
    student_quantile,
)
from ds_tune.objectives.trial import Measurement

RUN_NOISE = 0.005
"""Relative standard deviation between two runs of one configuration that their own steps don't show: repeats on one
machine lie within 1 to 2% of each other. Assumed at least, because two or three runs can only show more."""

LEVEL = 0.02
"""Two configurations whose rates are shown to be this close are level: what the faster one gains nobody feels."""

BUSY = 0.1
"""Relative difference between slow and fast steps of one configuration beyond which something else uses the machine."""

CHANCE = 4.0
"""Ratio to the true variance that the variance of a few differences may reach by chance (χ² with one degree of
freedom)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Finalist:
    """A configuration's measurements: of the search, and of the rounds of the verification in their order."""

    search: Measurement
    runs: Sequence[Measurement]

    @property
    def all_runs(self) -> list[Measurement]:
        return [self.search, *self.runs]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedRate:
    """Mean rate of a configuration's verification runs."""

    samples_per_second: float
    samples_per_second_ci95: tuple[float, float]
    runs: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Speedup:
    """How many times faster one trial is than another."""

    factor: float
    ci95: tuple[float, float]

    @classmethod
    def of(cls, fast: VerifiedRate | Measurement, slow: VerifiedRate | Measurement) -> Self:
        """Ratio of two rates, each with its interval."""
        factor, ci95 = speedup_ci95(
            fast.samples_per_second,
            fast.samples_per_second_ci95,
            slow.samples_per_second,
            slow.samples_per_second_ci95,
        )
        return cls(factor=factor, ci95=ci95)

    @property
    def settled(self) -> bool:
        """Whether the factor is an answer; where not, the lower end of the interval is a bound at least."""
        return is_answer(self.ci95)


def verified_rate(
    finalist: Finalist, others: Iterable[Finalist] = (), *, run_noise: float | None = None
) -> VerifiedRate:
    """Rate of one configuration that has at least one verification run.

    Args:
        others: finalists on the same quiet machine: how far their runs lie apart counts as well.
        run_noise: see `disturbed_run_noise`; None on a quiet machine.
    """
    if run_noise is None:
        rate, (low, high) = _mean_rate(finalist, others)
    else:
        rate, half = _undisturbed_rate(finalist, run_noise)
        low, high = rate - half, rate + half
    return VerifiedRate(
        samples_per_second=math.exp(rate),
        samples_per_second_ci95=(math.exp(low), math.exp(high)),
        runs=len(finalist.runs),
    )


def _mean_rate(finalist: Finalist, others: Iterable[Finalist]) -> tuple[float, tuple[float, float]]:
    """Logarithm of the geometric mean rate of the verification runs, with its 95% interval.

    The search is no part of the mean, for the configuration was picked for being fast there, but it is one more run to
    see from how far runs lie apart. The interval ends at the rate of the fastest step.
    """
    mean = statistics.fmean(map(log_rate, finalist.runs))
    assumed = RUN_NOISE**2 + statistics.fmean(map(_log_variance, finalist.runs))
    own, all_together = _run_variance([finalist], log_rate), _run_variance([finalist, *others], log_rate)
    half = _Z95 * math.sqrt(max(assumed, own, all_together) / len(finalist.runs))
    fastest = max(map(_fastest_log_rate, finalist.all_runs))
    return mean, (mean - half, min(mean + half, fastest))


def _undisturbed_rate(finalist: Finalist, run_noise: float) -> tuple[float, float]:
    """Logarithm of the rate of the best run, each counted by the fastest quarter of its steps, with half the width of
    its 95% interval.

    What else the machine does only ever adds to a step, and at times to a whole run, so that the best is the least
    disturbed.
    """
    half = _Z95 * math.sqrt(RUN_NOISE**2 + run_noise**2 / len(finalist.all_runs))
    return max(map(undisturbed_log_rate, finalist.all_runs)), half


def disturbed_run_noise(finalists: Sequence[Finalist]) -> float:
    """Standard deviation between runs of one configuration of the logarithm of their rates by the fastest quarter of
    the steps, pooled over configurations: how far whole runs are disturbed where something else uses the machine."""
    return math.sqrt(_run_variance(finalists, undisturbed_log_rate))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Difference of two configurations' rates."""

    log_ratio: float
    """Logarithm of the first one's rate over the second's."""
    is_faster: bool
    """The first is faster: one-sided p ≤ 0.01, or where something else uses the machine, the intervals lie apart."""
    is_level: bool
    """The two are within `LEVEL` of each other: two one-sided tests at p ≤ 0.05."""


def compare(one: Finalist, other: Finalist, *, run_noise: float | None = None) -> Comparison:
    """Comparison of two configurations that have at least one verification run each.

    Args:
        run_noise: see `disturbed_run_noise`; None on a quiet machine.
    """
    return _compare_rounds(one, other) if run_noise is None else _compare_undisturbed(one, other, run_noise)


def ratio_noise(run_noise: float) -> float:
    """Half the 95% interval of the logarithm of the ratio of two rates, each of a single run.

    Args:
        run_noise: see `disturbed_run_noise`; 0 on a quiet machine.
    """
    return _Z95 * math.sqrt(2 * (RUN_NOISE**2 + run_noise**2))


def _compare_rounds(one: Finalist, other: Finalist) -> Comparison:
    """By the mean difference of the rounds in which both ran.

    The runs of a round follow each other, so that what slows the machine for longer slows both.
    """
    pairs = list(zip(one.runs, other.runs, strict=False))
    ratios = [log_rate(first) - log_rate(second) for first, second in pairs]
    # A single round says nothing of how far rounds lie apart; the search is one more to see that from.
    spread = ratios if len(ratios) > 1 else [*ratios, log_rate(one.search) - log_rate(other.search)]
    within = statistics.fmean(_log_variance(first) + _log_variance(second) for first, second in pairs)
    assumed, seen = 2 * RUN_NOISE**2 + within, statistics.variance(spread)
    deviation = math.sqrt(max(assumed, seen) / len(ratios))
    ratio = statistics.fmean(ratios)
    settled, level = _Z99, _Z95_ONE_SIDED
    if seen > CHANCE * assumed:  # the deviation is estimated and not assumed
        settled, level = (student_quantile(table, max(len(ratios), 2)) for table in (T98, T95))
    return Comparison(
        log_ratio=ratio,
        is_faster=ratio > settled * deviation,
        is_level=abs(ratio) + level * deviation < math.log1p(LEVEL),
    )


def _compare_undisturbed(one: Finalist, other: Finalist, run_noise: float) -> Comparison:
    """By the rates of the least disturbed steps, which are the verified ones there: faster is whose interval lies above
    the other's.

    One lucky run settles nothing: the second best has to beat the best of the other, too.
    """
    (rate, half), (other_rate, other_half) = (_undisturbed_rate(each, run_noise) for each in (one, other))
    second, other_second = (sorted(map(undisturbed_log_rate, each.all_runs))[-2] for each in (one, other))
    error = _Z95_ONE_SIDED * math.sqrt(2) * RUN_NOISE
    ratio = rate - other_rate
    agree = max(rate - second, other_rate - other_second) < LEVEL
    return Comparison(
        log_ratio=ratio,
        is_faster=ratio > half + other_half and second > other_rate,
        is_level=agree and abs(ratio) + error < math.log1p(LEVEL),
    )


def is_busy(contenders: Sequence[Finalist]) -> bool:
    """Whether something else uses the machine: more than one of the contenders is disturbed, for a single one may be
    uneven by itself.

    Disturbed is one whose steps in the search differ by more than `BUSY`, or whose verification runs differ from the
    search by that.
    """
    disturbed = [
        step_spread([each.search]) > BUSY
        or any(abs(log_rate(run) - log_rate(each.search)) > math.log1p(BUSY) for run in each.runs)
        for each in contenders
    ]
    return sum(disturbed) > 1


def step_spread(runs: Sequence[Measurement]) -> float:
    """Relative difference between the slow and the fast steps of one configuration: the ninth decile over the first."""
    seconds = [value for run in runs for value in run.step_seconds]
    if len(seconds) < 2:
        return 0.0
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return deciles[-1] / deciles[0] - 1


def log_rate(run: Measurement) -> float:
    """Logarithm of a run's samples/s."""
    return math.log(run.samples_per_second)


def undisturbed_log_rate(run: Measurement) -> float:
    """Logarithm of a run's samples/s by the fastest quarter of its steps."""
    fastest = sorted(run.step_seconds)[: math.ceil(len(run.step_seconds) / 4)]
    return log_rate(run) + math.log(statistics.fmean(run.step_seconds) / statistics.fmean(fastest))


_Z95, _Z95_ONE_SIDED, _Z99 = map(statistics.NormalDist().inv_cdf, (0.975, 0.95, 0.99))


def _run_variance(finalists: Sequence[Finalist], rate: Callable[[Measurement], float]) -> float:
    """Variance of a rate's logarithm between runs of one configuration, pooled over configurations."""
    squares = [statistics.variance(map(rate, each.all_runs)) * len(each.runs) for each in finalists]
    return math.fsum(squares) / sum(len(each.runs) for each in finalists)


def _log_variance(run: Measurement) -> float:
    """Variance of the logarithm of a run's rate that its own steps show."""
    low, high = run.samples_per_second_ci95
    bounded = (low, min(high, math.exp(_fastest_log_rate(run))))
    return (log_half_width(run.samples_per_second, bounded) / _Z95) ** 2


def _fastest_log_rate(run: Measurement) -> float:
    """Logarithm of the rate at a run's fastest step; it bounds the interval, also of runs stored without a bound."""
    return log_rate(run) + math.log(statistics.fmean(run.step_seconds) / min(run.step_seconds)) + UNSEEN_FASTER
