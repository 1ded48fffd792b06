"""How many steps a trial runs."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from deepspeed.compile.init_z3 import WARMUP as DEEPSPEED_COMPILES_ANEW

from ds_tune.objectives.timing.intervals import (
    mean_ci95,
    warmup_length,
)
from ds_tune.objectives.timing.step_parts import StepParts
from ds_tune.objectives.timing.step_plan import PRECISE, StepPlan, is_hopeless


def timed(trace: Sequence[float], best_step_seconds: float | None = None, plan: StepPlan | None = None) -> list[float]:
    """The steps of a trace that a trial would time."""
    plan = plan or StepPlan()
    steps: list[float] = []
    while count := plan.next_steps(steps, best_step_seconds):
        assert len(steps) + count <= len(trace), "the plan wants more steps than it may"
        steps += trace[len(steps) : len(steps) + count]
    return steps


def noisy(mean: float, noise: float, count: int = 60, seed: int = 1) -> list[float]:
    random = np.random.default_rng(seed)
    return [float(value) for value in mean * (1 + noise * random.standard_normal(count))]


def test_steps_that_hardly_differ_are_timed_a_few_times() -> None:
    assert len(timed(noisy(0.1, 0.001))) <= 6


def test_noisy_steps_are_timed_until_the_mean_is_known_to_one_percent() -> None:
    steps = timed(noisy(0.1, 0.02))
    low, high = mean_ci95(steps)
    assert 10 < len(steps) < 40
    assert (high - low) / 2 <= 0.01 * 0.1 * 1.05


def test_timing_ends_with_its_budget_of_seconds_and_of_steps() -> None:
    assert len(timed(noisy(0.5, 0.1))) == 6, "six steps of half a second are three seconds"
    assert len(timed(noisy(0.001, 0.5))) == StepPlan().max_timed_steps


def test_two_long_steps_are_enough_where_they_agree_and_three_where_the_budget_is_used_up() -> None:
    assert len(timed([1.2, 1.205, 1.2, 1.2])) == 2
    assert len(timed([1.2, 1.3, 1.2, 1.2])) == 3, "they differ by 8%, and three are beyond three seconds"
    assert len(timed([2.0, 2.2, 2.0, 2.2])) == 3, "two are beyond three seconds, but differ by 10%"
    assert len(timed([1.6, 1.5, 1.4, 1.3, 1.3, 1.3])) == 5, "they get faster one by one, and may still warm up"
    assert len(timed([0.9, 0.9, 0.9, 0.9, 0.9])) == 4, "they are not long"


def test_no_third_long_step_is_begun_that_would_end_after_8_seconds() -> None:
    assert len(timed([4.0, 3.6, 3.2, 3.2])) == 2
    assert len(timed([9.0, 8.0, 8.0])) == 2, "of one alone nobody knows how far it is off"


def test_precise_plan_times_more_long_steps_than_the_default() -> None:
    assert len(timed([2.5, 2.52, 2.48, 2.5], plan=PRECISE)) == 3
    assert len(timed([2.5, 2.6, 2.5, 2.6], plan=PRECISE)) == 4, "they differ by 4%"
    assert len(timed([1.5, 1.51, 1.49, 1.5], plan=PRECISE)) == 4, "they are not long"
    assert PRECISE.next_steps([4.0], None) == 1, "one is never enough"


def test_a_long_step_that_was_warm_up_is_no_part_of_what_agrees() -> None:
    assert len(timed([4.0, 2.5, 2.51, 2.5, 2.5, 2.5], plan=dataclasses.replace(PRECISE, timed_seconds=60))) == 4


def test_stage_3_warms_up_longer() -> None:
    assert [StepPlan().warmup(stage) for stage in range(4)] == [1, 1, 1, 3]


def test_deepcompile_is_not_timed_before_deepspeed_has_compiled_its_final_graph() -> None:
    final = DEEPSPEED_COMPILES_ANEW + 1
    assert [StepPlan().warmup(stage, "deepcompile") for stage in range(4)] == [1, 1, 1, final]


def test_more_steps_are_timed_while_the_first_ones_were_warm_up() -> None:
    trace = [0.3, 0.2, *noisy(0.1, 0.001)]
    steps = timed(trace)
    assert len(steps) - warmup_length(steps) >= StepPlan().min_timed_steps


def test_a_clearly_slower_configuration_is_stopped_after_three_steps() -> None:
    assert len(timed(noisy(0.13, 0.005), best_step_seconds=0.1)) == 3
    assert len(timed(noisy(0.13, 0.005))) > 3


def test_one_that_is_as_fast_as_the_best_is_timed_to_the_end() -> None:
    for seed in range(100):
        steps = timed(noisy(1.0, 0.01, seed=seed), best_step_seconds=1.0)
        assert not is_hopeless(steps, 1.0)


def test_a_warm_up_that_goes_on_is_not_taken_for_a_slow_configuration() -> None:
    assert not is_hopeless([2.0, 1.7, 1.4], 1.0)
    assert not is_hopeless([2.0, 2.0, 2.0, 1.0], 1.0)


class ShortSteps:
    """Steps of a configuration with 64 micro-steps of 0.7 s, as the plan has them closed."""

    def __init__(self, trace: Sequence[float], *, gas: int = 64, closing: float = 0.5, plan: StepPlan | None = None):
        self.plan = plan or StepPlan()
        self.gas = gas
        self._closing = closing
        self._rest = iter(trace)
        self.counts: list[int] = []
        self.parts: StepParts | None = None

    def run(self, best_step_seconds: float | None = None, warmup: float = 0.7) -> StepParts | None:
        steps: list[list[float]] = []
        while count := self.plan.short_step(
            gradient_accumulation_steps=self.gas,
            micro_step_seconds=warmup,
            parts=self.parts,
            best_step_seconds=best_step_seconds,
        ):
            self.counts.append(count)
            steps.append([next(self._rest) for _ in range(count)])
            steps[-1][-1] += self._closing
            self.parts = StepParts.of(steps, self.gas)
        return self.parts


def test_a_step_of_45_seconds_is_known_after_one_short_step_where_micro_steps_hardly_differ() -> None:
    short = ShortSteps(noisy(0.7, 0.002))
    parts = short.run()
    assert parts is not None
    assert short.counts == [5], "3 s of micro-steps"
    assert parts.step_seconds == pytest.approx(64 * 0.7 + 0.5, rel=0.01)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("noise", [0.01, 0.05, 0.15])
@pytest.mark.parametrize("micro_step", [0.02, 0.1, 0.7, 1.2])
def test_short_steps_end_within_about_8_seconds_however_much_they_differ(
    micro_step: float, noise: float, seed: int
) -> None:
    trace = [max(seconds, micro_step / 10) for seconds in noisy(micro_step, noise, 1000, seed)]
    short = ShortSteps(trace, gas=1000)
    parts = short.run(warmup=micro_step)
    assert parts is not None
    assert parts.timed_seconds < 8.0 * 1.25
    assert all(count >= 4 for count in short.counts)


def test_micro_steps_that_differ_are_timed_in_more_short_steps_than_those_that_do_not() -> None:
    assert ShortSteps(noisy(0.05, 0.001, 999), gas=200).run(warmup=0.05) is not None
    steady, rough = (ShortSteps(noisy(0.05, noise, 999), gas=200) for noise in (0.001, 0.2))
    steady.run(warmup=0.05)
    rough.run(warmup=0.05)
    assert len(steady.counts) == 1 < len(rough.counts)


def test_a_short_step_has_no_more_micro_steps_than_a_whole_one() -> None:
    short = ShortSteps(noisy(0.2, 0.001), gas=8, closing=0.05)
    short.run(warmup=0.2)
    assert short.counts == [8]


@pytest.mark.parametrize(("gas", "micro_step"), [(3, 4.0), (9, 0.1)], ids=["few micro-steps", "short steps"])
def test_whole_steps_are_timed_where_a_step_has_few_micro_steps_or_is_short(gas: int, micro_step: float) -> None:
    assert ShortSteps(noisy(micro_step, 0.01), gas=gas).run(warmup=micro_step) is None


def test_whole_steps_are_timed_where_the_warm_up_alone_made_steps_look_long() -> None:
    parts = ShortSteps(noisy(0.01, 0.01), closing=0.0).run(warmup=0.7)
    assert parts is not None
    assert parts.step_seconds <= StepPlan().long_step_seconds


def test_precise_plan_times_whole_steps_instead_of_short_ones() -> None:
    assert ShortSteps(noisy(0.7, 0.01), plan=PRECISE).run() is None


def test_a_configuration_twice_as_slow_as_the_best_is_given_up_after_one_short_step() -> None:
    short = ShortSteps(noisy(0.7, 0.04))
    parts = short.run(best_step_seconds=64 * 0.7 / 2)
    assert parts is not None
    assert len(short.counts) == 1
    assert short.plan.is_hopeless(parts, 64 * 0.7 / 2)
    assert not short.plan.is_hopeless(parts, 64 * 0.7 / 1.4), "a trial's first steps may be slower"
    assert not short.plan.is_hopeless(parts, None)


def test_one_that_is_as_fast_as_the_best_is_never_given_up_in_short_steps() -> None:
    for seed in range(100):
        short = ShortSteps(noisy(0.7, 0.05, seed=seed), closing=0.0)
        parts = short.run(best_step_seconds=64 * 0.7)
        assert parts is not None and not short.plan.is_hopeless(parts, 64 * 0.7)


def test_three_short_steps_prove_a_configuration_slower_that_is_within_the_factor() -> None:
    steps = [noisy(0.1, 0.01, 20, seed) for seed in range(3)]
    plan = StepPlan()
    assert not plan.is_hopeless(StepParts.of(steps[:2], 64), 6.4 / 1.3)
    assert plan.is_hopeless(StepParts.of(steps, 64), 6.4 / 1.3)
    assert not plan.is_hopeless(StepParts.of(steps, 64), 6.4 / 1.03)


def test_micro_steps_that_get_faster_are_not_taken_for_a_slow_configuration() -> None:
    coming_down = [0.3 * (1 + 4 * 0.85**number) for number in range(20)]
    assert not StepPlan().is_hopeless(StepParts.of([coming_down], 64), 5.0)


def test_verification_times_a_very_long_step_once() -> None:
    assert len(timed([33.0] * 9, plan=PRECISE)) == 1
    assert len(timed([15.0] * 9, plan=PRECISE)) == 3
