"""How optimizer steps are timed as the owner of a loop reports them; real trials are in test_deepspeed_objective.py."""

import itertools
import math
from collections.abc import Callable, Generator, Sequence
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch

from ds_tune.objectives.rank.device import CpuMeter
from ds_tune.objectives.rank.loop import TrainingLoop
from ds_tune.objectives.rank.session import MAX_SKIPPED_STEPS, OverflowedError, TimingSession
from ds_tune.objectives.timing.schedule import Run, Step, Timed, Timing
from ds_tune.objectives.timing.step_plan import StepPlan

ALONE = SimpleNamespace(barrier=lambda: None)


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

    def gradient_accumulation_steps(self) -> int:
        return 1

    def __call__(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(loss=input_ids.sum())

    def backward(self, loss: torch.Tensor) -> None:
        pass

    def step(self) -> None:
        self.micro_steps += 1
        self.steps += self._closes
        self.skipped_steps += self._closes and self.steps in self._skipping


class CountingMeter(CpuMeter):
    """A clock that goes on by one second at each mark: a micro-step takes four."""

    def __init__(self) -> None:
        self._marks = itertools.count()

    def mark(self) -> float:
        return float(next(self._marks))


class Asking:
    """A schedule that asks for the runs it is given, whatever they take."""

    def __init__(self, gradient_accumulation_steps: int, *runs: tuple[int, int]) -> None:
        """
        Args:
            runs: how many steps, of how many micro-steps each.
        """
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.taken: list[Sequence[Step]] = []
        self._runs = runs

    def schedule(self) -> Generator[Run, Sequence[Step], None]:
        for steps, micro_steps in self._runs:
            self.taken.append((yield Run(steps=steps, micro_steps=micro_steps, phase="warm-up", deadline_seconds=1.0)))


def train(timing: Asking | Timing, engine: Any, entered: list[str] | None = None, batches: Any = None) -> TimingSession:
    """Trains until the session has enough, as `run_trial` does."""
    progress = SimpleNamespace(enter=([] if entered is None else entered).append, announce=lambda phase, seconds: None)
    meter = CountingMeter() if isinstance(engine, OverflowingEngine) else CpuMeter()
    session = TimingSession(timing, meter, ALONE, progress)  # type: ignore[arg-type]
    loop = TrainingLoop(
        engine,
        itertools.repeat({"input_ids": torch.ones(1, 4)}) if batches is None else batches,
        torch.device("cpu"),
        enter=session.enter,
        micro_step_done=session.micro_step_done,
    )
    while session.step_done(skipped=loop.step(session.micro_steps)):
        pass
    return session


def timed(engine: OverflowingEngine, gas: int, best: float | None = None) -> Timed:
    timing = Timing(
        plan=StepPlan(),
        zero_stage=1,
        compile="off",
        gradient_accumulation_steps=gas,
        predicted_step_seconds=1.0,
        best_step_seconds=best,
        agree=list,
    )
    return train(timing, engine).timed


def test_step_is_timed_from_its_data_to_its_end_with_all_its_micro_steps() -> None:
    entered: list[str] = []
    engine, asking = OverflowingEngine(set()), Asking(2, (3, 2))
    train(asking, engine, entered)
    assert (engine.micro_steps, engine.steps) == (6, 3)
    assert entered == ["data", "forward", "backward", "step"] * 6
    whole = Step(
        seconds=8.0, forward_seconds=2.0, backward_seconds=2.0, optimizer_seconds=2.0, micro_step_seconds=(4.0, 4.0)
    )
    assert asking.taken == [[whole] * 3]


def test_step_closed_early_has_as_many_micro_steps_as_were_asked_for() -> None:
    engine, asking = OverflowingEngine(set()), Asking(8, (2, 3), (1, 8))
    train(asking, engine)
    assert (engine.micro_steps, engine.steps) == (2 * 3 + 8, 3)
    [[first, second], [whole]] = asking.taken
    assert first == second
    assert (len(first.micro_step_seconds), len(whole.micro_step_seconds)) == (3, 8)


def test_owner_that_cannot_close_a_step_early_is_timed_by_whole_steps() -> None:
    asking = Asking(8, (1, 3))
    session = TimingSession(
        asking,  # type: ignore[arg-type]
        CountingMeter(),
        ALONE,  # type: ignore[arg-type]
        SimpleNamespace(enter=lambda part: None, announce=lambda phase, seconds: None),  # type: ignore[arg-type]
    )
    for _ in range(8):
        for part in ("forward", "backward", "step"):
            session.enter(part)
        session.micro_step_done()
    assert not session.step_done(skipped=False)
    [[step]] = asking.taken
    assert (step.seconds, step.forward_seconds, len(step.micro_step_seconds)) == (32.0, 8.0, 8)


def test_part_that_the_owner_never_enters_takes_no_time() -> None:
    asking = Asking(1, (1, 1))
    session = TimingSession(
        asking,  # type: ignore[arg-type]
        CountingMeter(),
        ALONE,  # type: ignore[arg-type]
        SimpleNamespace(enter=lambda part: None, announce=lambda phase, seconds: None),  # type: ignore[arg-type]
    )
    session.enter("forward")
    session.micro_step_done()
    session.step_done(skipped=False)
    [[step]] = asking.taken
    assert (step.seconds, step.forward_seconds, step.backward_seconds, step.optimizer_seconds) == (2.0, 1.0, 0.0, 0.0)


class Told:
    """Notes of steps that are told beforehand: the share of each, 0 for one to be left out."""

    def __init__(self, *shares: float) -> None:
        self._coming = list(shares)
        self._seen: list[float] = []

    def step_done(self) -> bool:
        self._seen.append(self._coming.pop(0))
        return self._seen[-1] > 0

    def shares(self) -> list[float]:
        return [share or 1.0 for share in self._seen]

    def forget(self) -> None:
        self._seen = []


def of_steps(timing: Asking | Timing, notes: Told, seconds: Sequence[int]) -> TimingSession:
    """A session whose steps take so many seconds, until it has enough."""
    announced = SimpleNamespace(enter=lambda part: None, announce=lambda phase, seconds: None)
    alone = SimpleNamespace(barrier=lambda: None, slowest=list)
    session = TimingSession(timing, CountingMeter(), alone, announced, notes=notes, leaves_out=True)  # type: ignore[arg-type]
    for each in seconds:
        for _ in range(each - 1):
            session.enter("forward")
        session.micro_step_done()
        if not session.step_done(skipped=False, is_whole=notes.step_done()):
            return session
    raise AssertionError("it wants more steps")


def test_steps_are_evened_by_their_share_of_a_mean_one() -> None:
    asking = Asking(1, (3, 1))
    of_steps(asking, Told(0.5, 2.0, 1.0), [3, 12, 6])
    [steps] = asking.taken
    assert [(step.seconds, step.micro_step_seconds, step.share) for step in steps] == [
        (6.0, (6.0,), 0.5), (6.0, (6.0,), 2.0), (6.0, (6.0,), 1.0),
    ]  # fmt: skip


def test_steps_that_are_left_out_are_made_up_for() -> None:
    asking = Asking(1, (1, 1), (3, 1))
    of_steps(asking, Told(1, 1, 0, 1, 0, 1), [9, 4, 50, 5, 60, 6])
    assert [[step.seconds for step in steps] for steps in asking.taken] == [[9.0], [4.0, 5.0, 6.0]]


def test_mean_step_of_uneven_ones_is_all_seconds_over_all_tokens() -> None:
    timing = Timing(
        plan=StepPlan(min_timed_steps=4, max_timed_steps=4, long_step_seconds=1000.0),
        zero_stage=1,
        compile="off",
        gradient_accumulation_steps=1,
        predicted_step_seconds=1.0,
        best_step_seconds=None,
        agree=list,
    )
    # Two seconds a step, and four for each mean step's tokens.
    timed = of_steps(timing, Told(1.0, 1.5, 0.5, 1.75, 0.25), [6, 8, 4, 9, 3]).timed
    assert len(timed.step_seconds) == 4
    assert math.fsum(timed.step_seconds) / 4 == pytest.approx((8 + 4 + 9 + 3) / 4)
    assert timed.mean("seconds") == pytest.approx(6.0)
    assert timed.step_seconds[1] / timed.step_seconds[3] == pytest.approx((4 / 0.5) / (3 / 0.25))
    assert timed.ci95[0] <= 6.0 <= timed.ci95[1]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_whole_steps_after_steps_closed_early_learn_what_a_loop_by_hand_learns(
    stage: int, engine_of: Callable[..., deepspeed.DeepSpeedEngine]
) -> None:
    ids = torch.randint(501, (8, 2, 16), generator=torch.Generator().manual_seed(1))
    micro_batches = [{"input_ids": each, "labels": each} for each in ids]

    def loss(engine: deepspeed.DeepSpeedEngine) -> float:
        with torch.no_grad():
            return float(engine(**micro_batches[0]).loss)

    engine = engine_of(stage, layers=1, accumulation=4, dropout="none")
    train(Asking(4, (2, 2), (1, 4)), engine, batches=iter(micro_batches))
    assert engine.global_steps == 3

    by_hand = engine_of(stage, layers=1, accumulation=4, dropout="none")
    for number, micro_batch in enumerate(micro_batches):
        by_hand.set_gradient_accumulation_boundary(number in (1, 3, 7))
        by_hand.backward(by_hand(**micro_batch).loss)
        by_hand.step()
    assert by_hand.global_steps == 3
    assert loss(engine) == loss(by_hand)


def test_step_that_overflow_skipped_is_run_again_and_never_timed() -> None:
    engine, asking = OverflowingEngine({1, 3}), Asking(1, (2, 1))
    session = train(asking, engine)
    assert engine.micro_steps == 4
    assert [step.seconds for step in asking.taken[0]] == [4.0, 4.0]
    assert session.skipped_steps == 2


def test_loss_scale_that_never_settles_is_an_error_that_says_what_to_try() -> None:
    engine = OverflowingEngine(set(range(1000)))
    with pytest.raises(OverflowedError, match="try bf16"):
        train(Asking(1, (1, 1)), engine)
    assert engine.micro_steps == MAX_SKIPPED_STEPS + 1


def test_step_closed_early_says_what_a_whole_one_spends_in_each_part() -> None:
    asking = Asking(20, (1, 5))
    train(asking, OverflowingEngine(set()))
    [[step]] = asking.taken
    assert (step.forward_seconds, step.backward_seconds, step.optimizer_seconds) == (20.0, 20.0, 20.0)
    assert step.seconds == math.fsum(step.micro_step_seconds) == 20.0


def test_short_step_that_overflow_skipped_gives_no_closing_time() -> None:
    engine, asking = OverflowingEngine({1}), Asking(20, (1, 5))
    train(asking, engine)
    assert (engine.steps, engine.micro_steps) == (2, 10)
    [[step]] = asking.taken
    assert len(step.micro_step_seconds) == 5


def test_long_step_of_many_micro_steps_is_put_together_from_the_fewest() -> None:
    engine = OverflowingEngine(set())
    found = timed(engine, 100)
    assert found.parts is not None
    assert (engine.steps, engine.micro_steps) == (2, 3 + 4)
    assert found.step_seconds == [pytest.approx(400.0)]
    assert found.parts.closing_seconds == (4.0,)
    assert not found.stopped_early
    assert found.mean("optimizer_seconds") == 100.0
    assert [len(step.micro_step_seconds) for step in found.warmup] == [3]


def test_long_step_that_is_slower_than_the_best_is_stopped_early() -> None:
    assert timed(OverflowingEngine(set()), 100, best=40.0).stopped_early


def test_steps_of_three_micro_steps_are_not_put_together() -> None:
    found = timed(OverflowingEngine(set()), 3)
    assert found.parts is None
    assert [len(step.micro_step_seconds) for step in found.steps] == [3, 3]


def test_first_steps_cost_nothing_where_they_are_as_fast_as_the_others() -> None:
    assert timed(OverflowingEngine(set()), 3).first_steps_seconds(3) == 0.0
