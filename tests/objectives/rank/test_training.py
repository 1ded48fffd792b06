"""How whole optimizer steps are timed; real trials are in test_deepspeed_objective.py."""

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch

from ds_tune.objectives.rank.device import CpuMeter
from ds_tune.objectives.rank.training import MAX_SKIPPED_STEPS, OverflowedError, Step, StepTimer, Timing
from ds_tune.objectives.timing.step_plan import StepPlan


class OverflowingEngine:
    """Counts as DeepSpeed's engine does in fp16, which needs a GPU: the steps named are skipped."""

    def __init__(self, skipping: set[int]) -> None:
        self.skipped_steps = 0
        self.steps = 0
        self.micro_steps = 0
        self._skipping = skipping
        self._closes = False

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self._closes = is_boundary

    def __call__(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(loss=input_ids.sum())

    def backward(self, loss: torch.Tensor) -> None:
        pass

    def step(self) -> None:
        self.micro_steps += 1
        self.steps += self._closes
        self.skipped_steps += self._closes and self.steps in self._skipping


class CountingMeter(CpuMeter):
    """A clock that goes on by one second at each mark."""

    def __init__(self) -> None:
        self._marks = itertools.count()

    def mark(self) -> float:
        return float(next(self._marks))


def timer(engine: OverflowingEngine, steps: int, phases: list[str]) -> StepTimer:
    batch = {"input_ids": torch.ones(1, 4)}
    return StepTimer(
        engine,
        itertools.repeat(batch),
        steps,
        torch.device("cpu"),
        CountingMeter(),
        SimpleNamespace(enter=phases.append),  # type: ignore[arg-type]
    )


@pytest.mark.usefixtures("one_rank")
def test_a_step_is_timed_from_its_data_to_its_end_with_all_its_micro_steps() -> None:
    phases: list[str] = []
    engine = OverflowingEngine(set())
    steps = timer(engine, 2, phases).run(3)
    assert (engine.micro_steps, engine.steps) == (6, 3)
    assert phases == ["data", "forward", "backward", "step"] * 6
    # Four marks a micro-step and one behind the step; the first micro-step lasts from the step's begin to its own end.
    whole = Step(
        seconds=9.0, forward_seconds=2.0, backward_seconds=2.0, optimizer_seconds=2.0, micro_step_seconds=(4.0,)
    )
    assert steps == [whole] * 3


@pytest.mark.usefixtures("one_rank")
def test_a_step_may_be_closed_before_it_has_all_its_micro_steps() -> None:
    engine = OverflowingEngine(set())
    [first, second] = timer(engine, 8, []).run(2, micro_steps=3)
    assert (engine.micro_steps, engine.steps) == (6, 2)
    assert first == second
    assert len(first.micro_step_seconds) == 2
    timer(engine, 8, []).run(1)
    assert (engine.micro_steps, engine.steps) == (6 + 8, 3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_behind_a_step_that_was_closed_early_deepspeed_takes_whole_ones(
    stage: int, engine_of: Callable[..., deepspeed.DeepSpeedEngine]
) -> None:
    """A short warm-up, then steps of four micro-steps: what is learned is what a loop by hand learns."""
    ids = torch.randint(501, (8, 2, 16), generator=torch.Generator().manual_seed(1))
    micro_batches = [{"input_ids": each, "labels": each} for each in ids]

    def loss(engine: deepspeed.DeepSpeedEngine) -> float:
        with torch.no_grad():
            return float(engine(**micro_batches[0]).loss)

    timed = engine_of(stage, layers=1, accumulation=4, dropout="none")
    meter, progress = CpuMeter(), SimpleNamespace(enter=lambda phase: None)
    timed_steps = StepTimer(timed, iter(micro_batches), 4, torch.device("cpu"), meter, progress)  # type: ignore[arg-type]
    timed_steps.run(2, micro_steps=2)
    timed_steps.run(1)
    assert timed.global_steps == 3

    by_hand = engine_of(stage, layers=1, accumulation=4, dropout="none")
    for number, micro_batch in enumerate(micro_batches):
        by_hand.set_gradient_accumulation_boundary(number in (1, 3, 7))
        by_hand.backward(by_hand(**micro_batch).loss)
        by_hand.step()
    assert by_hand.global_steps == 3
    assert loss(timed) == loss(by_hand)


@pytest.mark.usefixtures("one_rank")
def test_a_step_that_overflow_skipped_is_run_again_and_never_timed() -> None:
    engine = OverflowingEngine({1, 3})
    overflowing = timer(engine, 1, [])
    steps = overflowing.run(2)
    assert engine.micro_steps == 4
    assert len(steps) == 2
    assert overflowing.skipped_steps == 2


@pytest.mark.usefixtures("one_rank")
def test_a_loss_scale_that_never_settles_is_an_error_that_says_what_to_try() -> None:
    engine = OverflowingEngine(set(range(1000)))
    with pytest.raises(OverflowedError, match="try bf16"):
        timer(engine, 1, []).run(1)
    assert engine.micro_steps == MAX_SKIPPED_STEPS + 1


@pytest.mark.usefixtures("one_rank")
def test_a_step_closed_early_says_what_a_whole_one_spends_in_each_call() -> None:
    [step] = timer(OverflowingEngine(set()), 20, []).run(1, micro_steps=5)
    assert (step.forward_seconds, step.backward_seconds, step.optimizer_seconds) == (20.0, 20.0, 20.0)
    assert step.seconds == math.fsum(step.all_micro_step_seconds) == 21.0, "four marks a micro-step and one more"


@pytest.mark.usefixtures("one_rank")
def test_a_short_step_that_overflow_skipped_gives_no_closing_time() -> None:
    engine = OverflowingEngine({1})
    [step] = timer(engine, 20, []).run(1, micro_steps=5)
    assert (engine.steps, engine.micro_steps) == (2, 10)
    assert len(step.all_micro_step_seconds) == 5


def timing(engine: OverflowingEngine, gas: int, best: float | None = None) -> Timing:
    progress = SimpleNamespace(enter=lambda phase: None, announce=lambda phase, seconds: None)
    return Timing(timer(engine, gas, []), gas, StepPlan(), best, torch.device("cpu"), progress)  # type: ignore[arg-type]


# CountingMeter's micro-step takes four seconds.
@pytest.mark.usefixtures("one_rank")
def test_a_long_step_of_many_micro_steps_is_put_together_from_the_fewest() -> None:
    engine = OverflowingEngine(set())
    steps = timing(engine, 100)
    [warmup] = steps._timer.run(1, micro_steps=3)
    timed = steps.short_steps(warmup)
    assert timed is not None and timed.parts is not None
    assert (engine.steps, engine.micro_steps) == (2, 3 + 4)
    assert timed.step_seconds == [pytest.approx(401.0)]
    assert timed.parts.closing_seconds == (5.0,)
    assert not timed.stopped_early and timed.deepspeed_samples_per_second is None
    assert timed.mean("optimizer_seconds") == 100.0


@pytest.mark.usefixtures("one_rank")
def test_a_long_step_that_is_slower_than_the_best_is_stopped_early() -> None:
    steps = timing(OverflowingEngine(set()), 100, best=40.0)
    [warmup] = steps._timer.run(1, micro_steps=3)
    timed = steps.short_steps(warmup)
    assert timed is not None and timed.stopped_early


@pytest.mark.usefixtures("one_rank")
def test_steps_of_three_micro_steps_are_not_put_together() -> None:
    steps = timing(OverflowingEngine(set()), 3)
    [warmup] = steps._timer.run(1)
    assert steps.short_steps(warmup) is None
