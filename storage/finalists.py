"""What the repeated runs of finalists, each in processes of its own, say together: rates, and which is faster."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from ds_tune.objectives.timing.intervals import T95, T98, UNSEEN_FASTER, log_half_width, student_quantile
from ds_tune.objectives.trial import Measurement

RUN_NOISE = 0.005
"""Relative standard deviation between two runs of one configuration that their own steps don't show: repeats on one
machine lie within 1 to 2% of each other. Assumed at least, because two or three runs can only show more."""

LEVEL = 0.02
"""Two configurations whose rates are shown to be this close are level: what the faster one gains nobody feels."""

BUSY = 0.1
"""Relative difference between slow and fast steps of one configuration beyond which something else uses the machine."""

CHANCE = 4.0
"""Of a few differences the variance is up to so many times the true one by chance (χ² with one degree of freedom)."""


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


def verified_rate(finalist: Finalist, others: Iterable[Finalist] = ()) -> VerifiedRate:
    """Geometric mean rate of the verification runs of one configuration, of which there is at least one.

    The search is no part of the mean, for the configuration was picked for being fast there, but it is one more run to
    see from how far runs lie apart. The interval ends at the rate of the fastest step.

    Args:
        others: finalists on the same machine: how far their runs lie apart counts as well.
    """
    mean = statistics.fmean(map(log_rate, finalist.runs))
    assumed = RUN_NOISE**2 + statistics.fmean(map(_log_variance, finalist.runs))
    own, all_together = _run_variance([finalist], log_rate), _run_variance([finalist, *others], log_rate)
    half = _Z95 * math.sqrt(max(assumed, own, all_together) / len(finalist.runs))
    fastest = max(map(_fastest_log_rate, finalist.all_runs))
    return VerifiedRate(
        samples_per_second=math.exp(mean),
        samples_per_second_ci95=(math.exp(mean - half), math.exp(min(mean + half, fastest))),
        runs=len(finalist.runs),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Difference of two configurations' rates."""

    log_ratio: float
    """Logarithm of the first one's rate over the second's."""
    is_faster: bool
    """The first is faster: one-sided p ≤ 0.01."""
    is_level: bool
    """The two are within `LEVEL` of each other: two one-sided tests at p ≤ 0.05."""


def compare(one: Finalist, other: Finalist, *, busy: bool) -> Comparison:
    """Comparison of two configurations that have at least one verification run each.

    Args:
        busy: whether something else uses the machine; see `is_busy`.
    """
    return _compare_undisturbed(one, other) if busy else _compare_rounds(one, other)


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


def _compare_undisturbed(one: Finalist, other: Finalist) -> Comparison:
    """By the best of each one's runs, each counted by the fastest quarter of its steps.

    What else the machine does only ever adds to a step, and at times to a whole run, so that the best is the least
    disturbed. The order is settled where the second best of one beats the best of the other.
    """
    (best, second), (other_best, other_second) = (
        sorted(map(undisturbed_log_rate, each.all_runs), reverse=True)[:2] for each in (one, other)
    )
    error = math.sqrt(2) * RUN_NOISE
    ratio = best - other_best
    agree = max(best - second, other_best - other_second) < LEVEL
    return Comparison(
        log_ratio=ratio,
        is_faster=second - other_best > _Z99 * error,
        is_level=agree and abs(ratio) + _Z95_ONE_SIDED * error < math.log1p(LEVEL),
    )


def undisturbed_speedup(
    one: Finalist, other: Finalist, others: Iterable[Finalist] = ()
) -> tuple[float, tuple[float, float]]:
    """How many times faster one configuration is by its least disturbed steps, with a 95% interval.

    The interval allows for what two runs differ by on a quiet machine, and for what the least disturbed steps of two
    runs differ by on this one.

    Args:
        others: further finalists, which show the latter, too.
    """
    machine_variance = _run_variance([one, other, *others], undisturbed_log_rate)
    variance = math.fsum(RUN_NOISE**2 + machine_variance / len(each.all_runs) for each in (one, other))
    best, other_best = (max(map(undisturbed_log_rate, each.all_runs)) for each in (one, other))
    half = _Z95 * math.sqrt(variance)
    return math.exp(best - other_best), (math.exp(best - other_best - half), math.exp(best - other_best + half))


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
