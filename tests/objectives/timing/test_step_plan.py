"""How many steps a trial runs."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from deepspeed.compile.init_z3 import WARMUP as DEEPSPEED_COMPILES_ANEW

from objectives.timing.intervals import (
    mean_ci95,
    warmup_length,
)
from objectives.timing.step_plan import PRECISE, MidStepRule, StepPlan, is_hopeless, later_half


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
    assert len(timed([4.0, 3.8, 3.6, 3.5, 3.5, 3.5])) == 5, "they get faster one by one, and may still warm up"
    assert len(timed([0.9, 0.9, 0.9, 0.9, 0.9])) == 4, "they are not long"


def test_one_long_step_is_enough_where_its_micro_steps_show_that_it_is_precise() -> None:
    plan = StepPlan()
    assert plan.next_steps([4.0], None, noisy(0.4, 0.005, 9)) == 0
    assert plan.next_steps([4.0], None, noisy(0.4, 0.1, 9)) == 1, "they differ too much"
    assert plan.next_steps([4.0], None, [0.36 + 0.01 * number for number in range(9)]) == 1, "they get slower"
    assert plan.next_steps([4.0], None, [1.3, 1.3, 1.3]) == 1, "three show no spread"
    assert plan.next_steps([0.8], None, noisy(0.08, 0.001, 9)) > 0, "it is not long"


def test_one_long_step_is_enough_of_a_configuration_that_has_clearly_lost() -> None:
    plan = StepPlan()
    rough = noisy(0.5, 0.08, 7)  # 4 s and some percent, as ZeRO-3's steps are
    assert plan.next_steps([4.0], None, rough) > 0, "a rate that is wanted"
    assert plan.next_steps([4.0], 3.0, rough) == 0
    assert plan.next_steps([4.0], 3.6, rough) > 0, "it may be as fast"
    assert plan.next_steps([4.0], 3.0, sorted(rough, reverse=True)) > 0, "it gets faster"
    assert plan.next_steps([4.0], 3.0, rough[:3]) > 0, "too few to know its spread"
    assert PRECISE.next_steps([4.0], 3.0, rough) > 0, "comparing closely, a loser's rate is wanted too"


def test_what_is_compared_closely_is_timed_longer() -> None:
    assert len(timed([2.5, 2.52, 2.48, 2.5], plan=PRECISE)) == 3
    assert len(timed([2.5, 2.6, 2.5, 2.6], plan=PRECISE)) == 4, "they differ by 4%"
    assert len(timed([1.5, 1.51, 1.49, 1.5], plan=PRECISE)) == 4, "they are not long"
    assert PRECISE.next_steps([4.0], None, noisy(0.4, 0.005, 9)) == 1, "one is never enough"


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


def rule(*, gas: int = 32, best_step_seconds: float = 10.0, zero_stage: int = 1) -> MidStepRule:
    made = StepPlan().mid_step_rule(
        zero_stage=zero_stage, gradient_accumulation_steps=gas, best_step_seconds=best_step_seconds
    )
    assert made is not None
    return made


def given_up_after(micro_steps: Sequence[float], rule: MidStepRule) -> int | None:
    """How many of the micro-steps are run until a trial is given up."""
    counts = range(1, len(micro_steps) + 1)
    return next((n for n in counts if rule.is_due(n) and rule.is_hopeless(micro_steps[:n])), None)


def test_without_a_best_nothing_is_given_up_within_a_step() -> None:
    assert StepPlan().mid_step_rule(zero_stage=1, gradient_accumulation_steps=8, best_step_seconds=None) is None


def test_with_few_micro_steps_a_step_neither() -> None:
    assert StepPlan().mid_step_rule(zero_stage=1, gradient_accumulation_steps=3, best_step_seconds=1.0) is None


def test_ranks_agree_behind_ever_more_micro_steps() -> None:
    assert [count for count in range(100) if rule().is_due(count)] == [8, 14, 26, 50, 98]


def test_a_hopeless_step_is_found_out_within_eight_micro_steps() -> None:
    assert given_up_after(noisy(40.0 / 32, 0.05), rule()) == 8


@pytest.mark.parametrize(("zero_stage", "given_up_from"), [(0, 1.5), (2, 1.5), (3, 2.5)])
def test_only_what_is_far_slower_than_the_best_is_given_up_within_a_step(zero_stage: int, given_up_from: float) -> None:
    slower = noisy(given_up_from * 10.0 * 1.1 / 32, 0.02)
    not_so_slow = noisy(given_up_from * 10.0 * 0.95 / 32, 0.02)
    assert given_up_after(slower, rule(zero_stage=zero_stage)) is not None
    assert given_up_after(not_so_slow, rule(zero_stage=zero_stage)) is None


def test_the_first_two_micro_steps_say_nothing_and_a_later_one_alone_neither() -> None:
    as_fast_as_the_best = noisy(10.0 / 32, 0.02)
    for number in range(8):
        slow_once = list(as_fast_as_the_best)
        slow_once[number] = 30.0
        assert given_up_after(slow_once, rule()) is None
    assert given_up_after([30.0, 30.0, *as_fast_as_the_best], rule()) is None


def test_micro_steps_that_get_faster_are_waited_for() -> None:
    coming_down = [0.3 * (1 + 4 * 0.85**number) for number in range(60)]
    assert given_up_after(coming_down, rule()) is None


def test_what_is_far_beyond_hope_is_not_waited_for() -> None:
    """A busy machine made micro-steps look as if they got faster for a whole step of 16 s."""
    coming_down = [0.3 * (1 + 4 * 0.85**number) for number in range(60)]
    assert given_up_after(coming_down, rule(best_step_seconds=10.0 / 8)) == 8


def test_short_steps_and_short_glimpses_are_not_given_up() -> None:
    assert given_up_after(noisy(1.9 / 32, 0.01), rule(best_step_seconds=0.1)) is None, "a step of 1.9 s is no loss"
    quick = given_up_after(noisy(3.0 / 200, 0.01, 200), rule(best_step_seconds=0.1, gas=200))
    assert quick is not None and 3.0 / 200 * quick > 0.9, "a second is to be seen of it"


def test_a_step_is_estimated_from_the_later_half_of_its_micro_steps() -> None:
    micro_steps = [9.0, 8.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0]
    assert later_half(micro_steps) == [1.0, 1.0, 1.0]
    assert rule(gas=32).step_seconds(micro_steps) == 32.0
