"""What step times say: warm-up, drift, means, throughputs and speed-ups with their intervals."""

import math
import statistics

import numpy as np
import pytest

from ds_tune.objectives.timing.intervals import (
    effective_size,
    is_answer,
    is_drifting,
    mean_ci95,
    speedup_ci95,
    step_ci95,
    throughput,
    warmup_length,
)


def noisy(mean: float, noise: float, count: int = 60, seed: int = 1) -> list[float]:
    random = np.random.default_rng(seed)
    return [float(value) for value in mean * (1 + noise * random.standard_normal(count))]


def test_first_steps_that_are_slower_are_warm_up_and_others_are_not() -> None:
    assert warmup_length([2.0, 1.5, 1.0, 1.0, 1.01, 1.0, 0.99, 1.0]) == 2
    assert warmup_length(noisy(1.0, 0.01, 20)) == 0
    assert warmup_length([0.5, 1.0, 1.0, 1.0, 1.0, 1.0]) == 0, "a quick first step is no warm-up"


def test_steps_that_go_up_or_down_are_drifting() -> None:
    assert is_drifting([1.0 + 0.01 * step for step in range(8)])
    assert is_drifting([1.0 - 0.01 * step for step in range(8)])
    assert not is_drifting(noisy(1.0, 0.01, 20))


def test_steps_that_resemble_their_predecessors_count_for_fewer() -> None:
    assert effective_size(noisy(1.0, 0.01, 40)) > 25
    wave = [1.0 + 0.01 * math.sin(step / 3) for step in range(40)]
    assert effective_size(wave) < 8
    assert effective_size([1.0, 1.0, 1.0]) == 3


def test_the_interval_of_a_mean_is_student_s() -> None:
    # Mean 3, standard deviation sqrt(2.5), t(4) = 2.776: 3 ± 2.776 x sqrt(2.5 / 5).
    assert mean_ci95([1, 4, 2, 5, 3]) == pytest.approx((3 - 1.96293, 3 + 1.96293), abs=1e-4)
    # t(1) = 12.706: two values say little.
    assert mean_ci95([1, 3]) == pytest.approx((2 - 12.706, 2 + 12.706))


def test_values_that_are_no_series_all_count() -> None:
    rising = [1.0 + step / 100 for step in range(12)]
    half = 2.201 * statistics.stdev(rising) / math.sqrt(12)  # t(11)
    mean = statistics.fmean(rising)
    assert mean_ci95(rising, independent=True) == pytest.approx((mean - half, mean + half), abs=1e-5)
    assert mean_ci95(rising)[1] > mean + 2 * half


def test_many_values_use_the_last_quantile_of_the_table() -> None:
    values = [1.0, 3.0] * 50
    half = 2.042 * math.sqrt(100 / 99) / 10
    assert mean_ci95(values) == pytest.approx((2 - half, 2 + half))


def test_a_single_value_has_an_unbounded_interval() -> None:
    assert mean_ci95([3.0]) == (-math.inf, math.inf)


def test_throughput_is_samples_over_the_mean_step() -> None:
    rate, (low, high) = throughput([0.9, 1.0, 1.1], 64)
    assert rate == pytest.approx(64.0)
    assert low == pytest.approx(64 / (1 + 4.303 * 0.1 / math.sqrt(3)))
    assert high == pytest.approx(64 / (0.99 * 0.9)), "faster than the fastest step"


def test_equal_steps_leave_no_doubt() -> None:
    assert throughput([0.5, 0.5, 0.5], 8) == (16.0, (16.0, 16.0))


@pytest.mark.parametrize("step_seconds", [[0.5], [0.1, 0.9]], ids=["one step", "steps that differ wildly"])
def test_the_interval_of_a_throughput_is_finite_and_contains_it(step_seconds: list[float]) -> None:
    rate, (low, high) = throughput(step_seconds, 8)
    assert 0 <= low <= rate <= high < math.inf


def test_no_step_has_no_throughput() -> None:
    with pytest.raises(ValueError, match="no optimizer step"):
        throughput([], 8)


def test_a_speedup_carries_the_doubt_of_both_figures() -> None:
    ratio, (low, high) = speedup_ci95(200.0, (190.0, 210.0), 100.0, (95.0, 105.0))
    assert ratio == 2.0
    half = math.sqrt(2) * math.log(210 / 190) / 2
    assert (low, high) == pytest.approx((2 * math.exp(-half), 2 * math.exp(half)))


@pytest.mark.parametrize("step_seconds", [[0.39, 0.98, 0.6], [0.1, 9.0], [1e-9, 1e9, 1.0, 5.0]])
def test_no_mean_step_is_faster_than_the_fastest_one_timed(step_seconds: list[float]) -> None:
    low, _ = step_ci95(step_seconds)
    assert low == pytest.approx(0.99 * min(step_seconds))


def test_an_interval_that_spans_more_than_a_factor_of_two_is_no_answer() -> None:
    assert is_answer((1.0, 2.0))
    assert not is_answer((1.0, 2.1))
    assert not is_answer((0.0, 2960690.9))
