"""What repeated runs of a finalist say together."""

import dataclasses
import math

import pytest

from objectives.trial import Measurement
from storage.verification import RUN_NOISE, verified_rate

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


def run(rate: float, half_width: float = 0.0) -> Measurement:
    return dataclasses.replace(
        RUN, samples_per_second=rate, samples_per_second_ci95=(rate - half_width, rate + half_width)
    )


def test_the_mean_of_runs_is_the_one_of_their_ratios() -> None:
    assert verified_rate([run(40.0), run(90.0)], run(60.0)).samples_per_second == pytest.approx(60.0)


def test_one_run_is_not_trusted_further_than_two_runs_differ() -> None:
    low, high = verified_rate([run(50.0)], run(50.0)).samples_per_second_ci95
    assert math.log(high / low) == pytest.approx(2 * 1.96 * RUN_NOISE)


def test_runs_that_differ_widen_the_interval_and_more_runs_narrow_it() -> None:
    def width(*rates: float) -> float:
        low, high = verified_rate([run(rate) for rate in rates], run(50.0)).samples_per_second_ci95
        return high / low

    assert width(50.0, 50.0) < width(50.0) < width(48.0, 52.0)


def test_noise_within_the_runs_counts_too() -> None:
    quiet, noisy = verified_rate([run(50.0)], RUN), verified_rate([run(50.0, half_width=2.0)], RUN)
    assert noisy.log_variance > 5 * quiet.log_variance


def test_a_difference_is_settled_where_it_is_larger_than_chance() -> None:
    fast, slow, level = (verified_rate([run(rate)], run(rate)) for rate in (52.0, 50.0, 51.9))
    assert fast.is_faster_than(slow)
    assert not slow.is_faster_than(fast)
    assert not fast.is_faster_than(level)


def test_a_search_that_measured_something_else_is_a_reason_for_doubt() -> None:
    doubtful, sure = verified_rate([run(50.0)], run(60.0)), verified_rate([run(50.0)], run(50.0))
    assert doubtful.log_rate == sure.log_rate
    low, high = doubtful.samples_per_second_ci95
    assert low < 45 and high > 55
    assert doubtful.log_variance > 100 * sure.log_variance
