"""What repeated runs of finalists say together."""

import dataclasses
import math
from collections.abc import Sequence

import pytest

from ds_tune.objectives.trial import Measurement
from ds_tune.storage.finalists import (
    RUN_NOISE,
    Comparison,
    Finalist,
    Speedup,
    compare,
    disturbed_run_noise,
    is_busy,
    step_spread,
    verified_rate,
)

RUN = Measurement(
    step_seconds=(1.0, 1.0),
    samples_per_second=50.0,
    samples_per_second_ci95=(50.0, 50.0),
    forward_seconds=0.3,
    backward_seconds=0.5,
    optimizer_seconds=0.2,
    deepspeed_samples_per_second=None,
    warmup_step_seconds=(1.0,),
    skipped_steps=0,
    peak_memory_bytes=2**30,
    reserved_memory_bytes=2**30,
    alloc_retries=0,
    setup_seconds=1.0,
    wall_seconds=10.0,
    model_parameters=1000,
    flops_per_sample=1e9,
)


def run(rate: float, half_width: float = 0.0, steps: Sequence[float] = (0.9, 1.1)) -> Measurement:
    """A run of this rate; `steps` are its step times over their mean."""
    return dataclasses.replace(
        RUN,
        samples_per_second=rate,
        samples_per_second_ci95=(rate - half_width, rate + half_width),
        step_seconds=tuple(steps),
    )


def finalist(*rates: float, search: float | None = None) -> Finalist:
    return Finalist(run(rates[0] if search is None else search), [run(rate) for rate in rates])


def disturbed(*steps: Sequence[float], undisturbed_rate: float = 100.0) -> Finalist:
    """Runs of a configuration whose steps take 1 s on a quiet machine; the first is the search."""
    runs = [run(undisturbed_rate * len(each) / sum(each), steps=each) for each in steps]
    return Finalist(runs[0], runs[1:])


def test_mean_of_runs_is_geometric() -> None:
    assert verified_rate(finalist(40.0, 90.0, search=60.0)).samples_per_second == pytest.approx(60.0)


def test_one_run_is_not_trusted_further_than_two_runs_differ() -> None:
    low, high = verified_rate(finalist(50.0)).samples_per_second_ci95
    assert math.log(high / low) == pytest.approx(2 * 1.96 * RUN_NOISE, rel=1e-3)


def test_runs_that_differ_widen_the_interval_and_more_runs_narrow_it() -> None:
    def width(*rates: float) -> float:
        low, high = verified_rate(finalist(*rates, search=50.0)).samples_per_second_ci95
        return high / low

    assert width(50.0, 50.0) < width(50.0) < width(48.0, 52.0)


def test_noise_within_the_runs_widens_the_interval() -> None:
    quiet = verified_rate(Finalist(run(50.0), [run(50.0)]))
    noisy = verified_rate(Finalist(run(50.0), [run(50.0, half_width=2.0)]))
    assert noisy.samples_per_second_ci95[0] < 0.98 * quiet.samples_per_second_ci95[0]


def test_runs_of_other_finalists_that_lie_apart_widen_the_interval() -> None:
    alone = verified_rate(finalist(50.0))
    beside = verified_rate(finalist(50.0), [finalist(60.0, 90.0, search=40.0)])
    assert beside.samples_per_second_ci95[0] < 0.9 * alone.samples_per_second_ci95[0]


def test_no_verified_rate_is_above_that_of_the_fastest_step() -> None:
    _, high = verified_rate(finalist(50.0, 10.0, search=90.0)).samples_per_second_ci95
    assert high == pytest.approx(90.0 / 0.9 * math.exp(0.01))


def test_stored_interval_without_bound_does_not_overflow() -> None:
    """As an earlier version stored it of steps of 0.39 to 0.98 s; its square overflowed the verified rate."""
    drifted = dataclasses.replace(run(97.0, steps=(0.39, 0.6, 0.98)), samples_per_second_ci95=(55.8, 14815.0))
    low, high = verified_rate(Finalist(drifted, [drifted])).samples_per_second_ci95
    assert 40 < low < 97 < high < 165


@pytest.mark.parametrize("steps", [(1e-9, 1e9), (1e-12, 1.0), (5.0,), (1.0,) * 40], ids=str)
def test_every_statistic_of_a_verification_is_finite_whatever_steps_it_has(steps: Sequence[float]) -> None:
    wild = Finalist(run(1e-9, steps=steps), [run(1e9, half_width=1e9, steps=steps)])
    rate = verified_rate(wild, [finalist(50.0)])
    provenance = [rate.samples_per_second, *rate.samples_per_second_ci95, step_spread(wild.all_runs)]
    run_noise = disturbed_run_noise([wild, finalist(50.0)])
    undisturbed = verified_rate(wild, run_noise=run_noise)
    speedup = Speedup.of(undisturbed, verified_rate(finalist(50.0), run_noise=run_noise))
    assert all(map(math.isfinite, [*provenance, run_noise, speedup.factor, *speedup.ci95]))
    for noise in (None, run_noise):
        assert not compare(finalist(50.0), wild, run_noise=noise).is_level


def test_difference_larger_than_chance_is_settled_and_a_small_one_is_level() -> None:
    fast, slow, level = finalist(52.0, 52.0), finalist(50.0, 50.0), finalist(51.9, 51.9)
    assert compare(fast, slow).is_faster
    assert not compare(slow, fast).is_faster
    assert compare(fast, level).is_level


def test_wide_intervals_are_no_evidence_that_two_are_level() -> None:
    one, other = (Finalist(run(rate, 30.0), [run(rate, 30.0)]) for rate in (100.0, 99.0))
    comparison = compare(one, other)
    assert not comparison.is_level
    assert not comparison.is_faster


def test_drift_that_slows_both_runs_of_a_round_does_not_hide_the_faster_one() -> None:
    fast, slow = finalist(100.0, 80.0, 60.0, search=100.0), finalist(90.0, 72.0, 54.0, search=90.0)
    assert compare(fast, slow).is_faster


def busy(one: Finalist, other: Finalist) -> Comparison:
    return compare(one, other, run_noise=disturbed_run_noise([one, other]))


QUIET, HIT, HIT_LATER = (1.0, 1.0, 1.0, 1.0), (1.0, 1.8, 1.8, 1.8), (1.8, 1.8, 1.8, 1.8)


def test_least_disturbed_steps_decide_where_a_neighbour_comes_and_goes() -> None:
    fast = disturbed(HIT, HIT, HIT, undisturbed_rate=105.0)
    slow = disturbed(QUIET, QUIET, HIT)
    assert compare(slow, fast).log_ratio > 0, "by their means the slower one is ahead"
    assert busy(fast, slow).is_faster


def test_order_that_one_undisturbed_run_shows_alone_is_not_settled() -> None:
    comparison = busy(disturbed(HIT_LATER, QUIET, undisturbed_rate=105.0), disturbed(QUIET, QUIET))
    assert comparison.log_ratio > 0
    assert not comparison.is_faster
    assert not comparison.is_level


def test_one_lucky_run_of_many_does_not_settle_the_order() -> None:
    lucky = disturbed(*[QUIET] * 6, (0.7, 0.7, 0.7, 0.7), undisturbed_rate=100.0)
    others = disturbed(*[QUIET] * 7, undisturbed_rate=102.0)
    comparison = busy(lucky, others)
    assert comparison.log_ratio > 0.3
    assert not comparison.is_faster


def test_configuration_slow_in_one_round_stays_in_the_running_on_a_busy_machine() -> None:
    fast, slow_once = disturbed(QUIET, QUIET, undisturbed_rate=105.0), disturbed(QUIET, HIT_LATER)
    assert not busy(fast, slow_once).is_faster


@pytest.mark.parametrize("rate", [105.0, 115.0, 150.0, 400.0])
def test_two_are_told_apart_on_a_busy_machine_where_the_intervals_shown_do_not_overlap(rate: float) -> None:
    one = disturbed(QUIET, QUIET, QUIET, undisturbed_rate=rate)
    other = disturbed(QUIET, (1.3, 1.3, 1.3, 1.3), QUIET)
    run_noise = disturbed_run_noise([one, other])
    fast, slow = (verified_rate(each, run_noise=run_noise) for each in (one, other))
    comparison = compare(one, other, run_noise=run_noise)
    assert comparison.is_faster == (fast.samples_per_second_ci95[0] > slow.samples_per_second_ci95[1])
    assert comparison.is_faster == (rate > 130), "each interval reaches a tenth to either side"
    speedup = Speedup.of(fast, slow)
    assert speedup.factor == pytest.approx(math.exp(comparison.log_ratio)) == pytest.approx(rate / 100)


def test_undisturbed_speedup_is_the_one_of_a_quiet_machine() -> None:
    bimodal = (1.0, 1.8, 1.0, 1.8, 1.8, 1.0, 1.0, 1.8)
    finalists = [disturbed(bimodal, bimodal, undisturbed_rate=150.0), disturbed(bimodal, bimodal[::-1])]
    run_noise = disturbed_run_noise(finalists)
    speedup = Speedup.of(*(verified_rate(each, run_noise=run_noise) for each in finalists))
    assert speedup.factor == pytest.approx(1.5)
    assert 1.45 < speedup.ci95[0] < 1.5 < speedup.ci95[1] < 1.55


def test_machine_is_busy_where_more_than_one_configuration_is_disturbed() -> None:
    uneven = disturbed((1.0, 1.8, 1.0, 1.8), (1.0, 1.8, 1.0, 1.8))
    even = Finalist(run(100.0, steps=(1.0, 1.01)), [run(101.0, steps=(1.0, 1.01))])
    other_in_search = Finalist(run(100.0, steps=(1.0, 1.01)), [run(70.0, steps=(1.0, 1.01))])
    assert not is_busy([even, even, uneven]), "one may be uneven by itself"
    assert is_busy([even, uneven, uneven])
    assert is_busy([even, uneven, other_in_search])
