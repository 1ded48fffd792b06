"""How many steps a trial runs, and what its step times say."""

import math

import pytest

from objectives.timing import StepPlan, mean_ci95, speedup_ci95, throughput


@pytest.mark.parametrize(
    ("last_warmup_seconds", "steps"),
    [(100.0, 5), (1.0, 8), (0.79, 11), (0.001, 20), (0.0, 20)],
    ids=["slow: the fewest", "8 s of work", "rounded up", "quick: the most", "too quick for the clock"],
)
def test_a_trial_times_eight_seconds_of_work_within_bounds(last_warmup_seconds: float, steps: int) -> None:
    assert StepPlan().timed(last_warmup_seconds) == steps


def test_stage_3_warms_up_longer() -> None:
    assert [StepPlan().warmup(stage) for stage in range(4)] == [2, 2, 2, 5]


def test_the_interval_of_a_mean_is_student_s() -> None:
    # Mean 3, standard deviation sqrt(2.5), t(4) = 2.776: 3 ± 2.776 x sqrt(2.5 / 5).
    assert mean_ci95([1, 2, 3, 4, 5]) == pytest.approx((3 - 1.96293, 3 + 1.96293), abs=1e-4)
    # t(1) = 12.706: two values say little.
    assert mean_ci95([1, 3]) == pytest.approx((2 - 12.706, 2 + 12.706))


def test_many_values_use_the_normal_quantile() -> None:
    values = [1.0, 3.0] * 50
    half = 1.960 * math.sqrt(100 / 99) / 10
    assert mean_ci95(values) == pytest.approx((2 - half, 2 + half))


def test_a_single_value_has_an_unbounded_interval() -> None:
    assert mean_ci95([3.0]) == (-math.inf, math.inf)


def test_throughput_is_samples_over_the_mean_step() -> None:
    rate, (low, high) = throughput([0.9, 1.0, 1.1], 64)
    assert rate == pytest.approx(64.0)
    half = 4.303 * 0.1 / math.sqrt(3)
    assert (low, high) == pytest.approx((64 / (1 + half), 64 / (1 - half)))


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
    assert (low, high) == pytest.approx((2 - 2 * math.sqrt(0.005), 2 + 2 * math.sqrt(0.005)))
