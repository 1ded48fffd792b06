"""The runs of optimizer steps that a trial is timed by, one after another: pure decisions, no clock and no torch."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Generator, Sequence
from typing import Self, TypeAlias

from ds_tune.objectives.timing.deadlines import timed_deadline, warmup_deadline
from ds_tune.objectives.timing.intervals import is_drifting, step_ci95, warmup_length
from ds_tune.objectives.timing.step_parts import FEWEST_MICRO_STEPS, StepParts
from ds_tune.objectives.timing.step_plan import StepPlan, is_hopeless

WARM_UP, TIMED = "warm-up", "timed steps"
"""Phases of a trial's steps."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimizer step on this rank."""

    seconds: float
    """Seconds of what was run: fewer micro-steps than a whole step has where it was closed early."""
    forward_seconds: float
    """Sum over the micro-steps of a whole step, of which some may not have been run; likewise below."""
    backward_seconds: float
    optimizer_seconds: float
    micro_step_seconds: tuple[float, ...]
    """Seconds of each micro-step, data loading included; the one that closes the step comes last."""
    share: float = 1.0
    """What this step trained on over what a mean one does; see `evened`."""

    def evened(self, share: float) -> Self:
        """The step with all its seconds divided by its share of a mean step, in tokens of all ranks without padding.

        Where samples differ in length, so do steps, and for no other reason than the data that they happened to get.
        Left as they are, they would seem to be noise, or under `group_by_length` a drift: the interval would be wider
        than it has to be, and trials longer. Divided, they are seconds for a mean step's tokens, and whatever compares
        seconds of steps, or makes samples/s of them, stays right.
        """
        return dataclasses.replace(
            self,
            seconds=self.seconds / share,
            forward_seconds=self.forward_seconds / share,
            backward_seconds=self.backward_seconds / share,
            optimizer_seconds=self.optimizer_seconds / share,
            micro_step_seconds=tuple(seconds / share for seconds in self.micro_step_seconds),
            share=share,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Optimizer steps to take back to back before times are read."""

    steps: int
    micro_steps: int
    """Micro-steps of each of them."""
    phase: str
    deadline_seconds: float
    """Longest that they may take before they count as hung."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """Steps of a trial on this rank, and what they come to."""

    warmup: Sequence[Step] = ()
    early: Sequence[Step] = ()
    """Whole steps that were timed but not yet steady; `steps` doesn't have them."""
    steps: Sequence[Step]
    step_seconds: Sequence[float]
    """Seconds of whole steps, or the one estimate that `parts` make."""
    ci95: tuple[float, float]
    """95% confidence interval of the mean whole step, in seconds."""
    parts: StepParts | None = None
    stopped_early: bool
    drifting: bool

    def mean(self, field: str) -> float:
        """Mean of a field of the steps that count."""
        return weighted_mean(self.steps, field)

    def first_steps_seconds(self, gradient_accumulation_steps: int) -> float:
        """Seconds that the first steps took beyond as many later micro-steps: compilation, for the most part."""
        seconds, optimizer_seconds = statistics.fmean(self.step_seconds), self.mean("optimizer_seconds")
        first = [*self.warmup, *self.early]
        shares = (len(step.micro_step_seconds) / gradient_accumulation_steps for step in first)
        usual = math.fsum(optimizer_seconds + share * (seconds - optimizer_seconds) for share in shares)
        return math.fsum(step.seconds for step in first) - usual


def weighted_mean(steps: Sequence[Step], field: str = "seconds") -> float:
    """Seconds of all steps over the tokens of all, as seconds for a mean step's tokens.

    The plain mean of evened steps would be above it: what a step costs beside its tokens weighs more in a small one.
    """
    return math.fsum(getattr(step, field) * step.share for step in steps) / math.fsum(step.share for step in steps)


Agree: TypeAlias = Callable[[Sequence[float]], list[float]]
"""Gives the largest of all ranks' values, one by one, and so the same on every rank."""

Schedule: TypeAlias = Generator[Run, Sequence[Step], Timed]
"""Yields what to run next and is sent the steps that were run."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Decisions on one configuration. All ranks decide on the same figures, and so alike."""

    plan: StepPlan
    zero_stage: int
    compile: str
    """How the model is compiled: the knob's value."""
    gradient_accumulation_steps: int
    predicted_step_seconds: float
    """Seconds of an optimizer step, rather too many, for the first deadline."""
    best_step_seconds: float | None
    """Seconds that a step of this batch takes at the study's best throughput, if there is one."""
    agree: Agree
    may_shorten: bool = True
    """Steps can be closed after fewer micro-steps; not where the loop is a person's own."""

    def schedule(self) -> Schedule:
        """Returns the runs of the trial: warm-up, then short steps or whole ones until the plan has enough."""
        gas, plan = self.gradient_accumulation_steps, self.plan
        steps, micro_steps = (
            plan.warmup(self.zero_stage, self.compile),
            min(gas, plan.warmup_micro_steps if self.may_shorten else gas),
        )
        deadline = warmup_deadline(self.predicted_step_seconds * micro_steps / gas, steps, self.compile)
        warmup = yield Run(steps=steps, micro_steps=micro_steps, phase=WARM_UP, deadline_seconds=deadline)
        timed = (yield from self._short_steps(warmup[-1])) if self.may_shorten else None
        if timed is None:
            timed = yield from self._whole_steps(warmup[-1])
        return dataclasses.replace(timed, warmup=warmup)

    def _short_steps(self, last: Step) -> Generator[Run, Sequence[Step], Timed | None]:
        """Steps that are closed early, and the whole one they are put together to.

        Args:
            last: the last step of the warm-up.

        Returns:
            None where whole steps are to be timed.
        """
        gas, plan, best = self.gradient_accumulation_steps, self.plan, self.best_step_seconds
        before = self.agree(last.micro_step_seconds)
        steps: list[Step] = []
        agreed: list[list[float]] = []
        parts: StepParts | None = None
        while count := plan.short_step(
            gradient_accumulation_steps=gas, micro_step_seconds=min(before), parts=parts, best_step_seconds=best
        ):
            steps += yield _timed_run(math.fsum(before) * max(count / len(before), 1.0), steps=1, micro_steps=count)
            before = self.agree(steps[-1].micro_step_seconds)
            agreed.append(before)
            parts = StepParts.of(agreed, gas)
        if parts is None or parts.step_seconds <= plan.long_step_seconds:
            return None
        own = StepParts.of([step.micro_step_seconds for step in steps], gas)
        own = dataclasses.replace(own, settling_micro_steps=parts.settling_micro_steps)
        return Timed(
            steps=steps,
            step_seconds=[own.step_seconds],
            ci95=own.ci95(),
            parts=own,
            stopped_early=plan.is_hopeless(parts, best),
            drifting=parts.is_drifting,
        )

    def _whole_steps(self, last: Step) -> Schedule:
        """Whole steps.

        Args:
            last: the last step of the warm-up.
        """
        gas, plan, best = self.gradient_accumulation_steps, self.plan, self.best_step_seconds
        [seconds] = self.agree([last.seconds])
        seconds *= gas / len(last.micro_step_seconds)
        steps: list[Step] = []
        agreed: list[float] = []
        while count := plan.next_steps(agreed, best):
            run = yield _timed_run(seconds, steps=count, micro_steps=gas)
            steps += run
            agreed += self.agree([step.seconds for step in run])
            seconds = agreed[-1]
        cut = warmup_length(agreed)
        steady = [step.seconds for step in steps[cut:]]
        # Exactly 1 where steps have equal shares.
        bias = weighted_mean(steps[cut:]) / statistics.fmean(steady)
        low, high = self._whole_steps_ci95(steps[cut:])
        return Timed(
            steps=steps[cut:],
            step_seconds=[bias * seconds for seconds in steady],
            ci95=(bias * low, bias * high),
            early=steps[:cut],
            stopped_early=best is not None and is_hopeless(agreed, best),
            drifting=is_drifting(agreed[cut:]),
        )

    def _whole_steps_ci95(self, steps: Sequence[Step]) -> tuple[float, float]:
        """The interval of the mean step; of a single one by its micro-steps, where it has enough of them."""
        if len(steps) == 1 and self.gradient_accumulation_steps >= FEWEST_MICRO_STEPS:
            return StepParts.of([steps[0].micro_step_seconds], self.gradient_accumulation_steps).ci95()
        return step_ci95([step.seconds for step in steps])


def _timed_run(step_seconds: float, *, steps: int, micro_steps: int) -> Run:
    """A run of timed steps of which each is expected to take so many seconds."""
    return Run(
        steps=steps,
        micro_steps=micro_steps,
        phase=TIMED,
        deadline_seconds=timed_deadline(step_seconds, steps),
    )
