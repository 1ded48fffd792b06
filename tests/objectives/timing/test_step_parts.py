"""Steps that are put together from the parts of short ones."""

import json
import math
import statistics
from dataclasses import asdict

import numpy as np
import pytest

from ds_tune.objectives.timing.intervals import T95, T98
from ds_tune.objectives.timing.step_parts import StepParts, whole_step

GAS = 64


def test_a_whole_step_has_one_first_and_one_closing_micro_step_and_plain_ones_between() -> None:
    parts = StepParts.of([[3.0, 1.0, 1.0, 5.0], [3.0, 1.0, 1.0, 7.0]], GAS)
    assert (parts.first_seconds, parts.closing_seconds) == ((3.0, 3.0), (5.0, 7.0))
    assert parts.plain_seconds == (1.0, 1.0, 1.0, 1.0)
    assert parts.step_seconds == 3.0 + 6.0 + 62 * 1.0
    assert parts.excess_seconds == 3.0 + 6.0 - 2 * 1.0
    assert (parts.micro_steps, parts.timed_seconds) == (8, 22.0)


def test_parts_of_whole_steps_make_their_mean() -> None:
    steps = [[2.0, 1.0, 1.01, 0.99, 3.0], [2.1, 1.02, 0.98, 1.0, 2.9]]
    assert StepParts.of(steps, 5).step_seconds == pytest.approx(statistics.fmean(map(math.fsum, steps)))


def test_a_slow_first_micro_step_after_each_optimizer_step_is_not_multiplied() -> None:
    """ZeRO gathers there what the optimizer has changed."""
    quick, slow = ([first, 1.0, 1.0, 1.0, 2.0] for first in (1.0, 9.0))
    assert StepParts.of([slow], GAS).step_seconds - StepParts.of([quick], GAS).step_seconds == 8.0


def test_plain_micro_steps_that_are_not_yet_steady_are_left_out() -> None:
    parts = StepParts.of([[1.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0]], GAS)
    assert parts.settling_micro_steps == 2
    assert parts.step_seconds == pytest.approx(3.0 + 62)
    assert parts.timed_seconds == pytest.approx(15.0), "they were run nevertheless"


def test_the_interval_of_one_short_step_assumes_a_tenth_of_its_excess() -> None:
    parts = StepParts.of([[1.0, 0.99, 1.0, 1.01, 1.0, 1.0, 3.0]], GAS)
    plain = 2.776 * 62 * statistics.stdev([0.99, 1.0, 1.01, 1.0, 1.0]) / math.sqrt(5)
    ends = 2.042 * math.hypot(0.1 * 2.0, math.sqrt(2) * statistics.stdev([0.99, 1.0, 1.01, 1.0, 1.0]))
    assert parts.error_seconds() == pytest.approx(math.hypot(plain, ends))
    low, high = parts.ci95()
    assert (low + high) / 2 == pytest.approx(parts.step_seconds)
    assert parts.error_seconds(T98) > parts.error_seconds(T95) == parts.error_seconds()


def test_error_of_three_short_steps_is_the_spread_of_their_last_micro_steps() -> None:
    steps = [[1.0, 1.0, 1.0, closing] for closing in (3.0, 3.3, 3.6)]
    assert StepParts.of(steps, GAS).error_seconds() == pytest.approx(4.303 * 0.3 / math.sqrt(3))


@pytest.mark.parametrize("noise", [0.005, 0.02, 0.1])
def test_the_interval_holds_the_true_step_19_times_out_of_20(noise: float) -> None:
    held = 0
    for seed in range(400):
        random = np.random.default_rng(seed)
        steps = 1 + noise * random.standard_normal((2, 8))
        steps[:, 0] += 1.0 + 0.05 * random.standard_normal(2)
        steps[:, -1] += 2.0 + 0.1 * random.standard_normal(2)
        low, high = StepParts.of(steps.tolist(), GAS).ci95()
        held += low <= GAS + 3.0 <= high
    assert held >= 0.93 * 400


def test_correlated_micro_steps_widen_the_interval() -> None:
    random = np.random.default_rng(1)
    independent = 1 + 0.02 * random.standard_normal(100)
    correlated = np.sort(independent)
    narrow, wide = (StepParts.of([values.tolist()], GAS).error_seconds() for values in (independent, correlated))
    assert wide > 2 * narrow


def test_whole_step_of_any_part_is_its_ends_and_the_mean_of_the_rest() -> None:
    assert whole_step(5.0, [1.0, 3.0], 10) == 5.0 + 8 * 2.0


def test_parts_survive_json() -> None:
    parts = StepParts.of([[1.0, 4.0, 1.0, 1.0, 1.0, 2.0]], GAS)
    assert StepParts.from_json(json.loads(json.dumps(asdict(parts)))) == parts


def test_interval_of_parts_is_not_below_as_many_of_the_fastest_micro_steps() -> None:
    parts = StepParts.of([[1.0, 1.0, 1.0, 29.0, 1.0, 2.0]], gradient_accumulation_steps=8)
    assert parts.ci95()[0] == pytest.approx(0.99 * 8 * 1.0)
