"""How many steps a trial runs, decided from the step times so far: pure arithmetic, no clock and no torch."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import TypeVar

from objectives.timing.intervals import (
    T98,
    effective_size,
    is_drifting,
    mean_ci95,
    step_ci95,
    student_quantile,
    warmup_length,
)

HOPELESS_MARGIN = 0.05
"""Two runs of one configuration differ by 1 to 2%, by more where launching kernels decides; and what is within this of
the best runs again in the verification anyway."""

FALLING = 0.9
"""Last steps below this fraction of the mean say that steps still get faster."""

MOST_FALLING_STEPS = 6
"""So many long steps are enough also where they get faster one by one."""

SETTLING_MICRO_STEPS = 2
"""The first micro-steps of a trial say nothing of the rest. Recorded on an H200: in stages 0 to 2 the first takes up to
1.8 times as long as those behind it, in stage 3 the second up to 7.7 times, when the prefetching is set up."""

FEWEST_ACCUMULATED = 4
"""With fewer micro-steps a step, those that close one are too large a part of it to be left out."""

FEWEST_MICRO_STEPS = 6
"""Behind those, fewer cannot show whether they still get faster."""
FAR_BEYOND = 3.0
"""Where the fastest so far is beyond the limit by this, it does not matter whether they still get faster."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """How long a trial is timed."""

    warmup_steps: int = 1
    """Steps that are left out in any case; `warmup_length` finds how many more were not yet steady."""
    zero3_extra_warmup_steps: int = 2
    """Stage 3 records which parameters to prefetch during its first steps, and those are slow."""
    deepcompile_zero3_warmup_steps: int = 6
    """Of DeepCompile at stage 3, in all: in its sixth step DeepSpeed compiles anew, to prefetch (`WARMUP` in
    deepspeed/compile/init_z3.py)."""
    warmup_micro_steps: int = 3
    """The most that such a step has: its first micro-steps and its optimizer step are odd, those between are not."""
    min_timed_steps: int = 4
    max_timed_steps: int = 40
    timed_seconds: float = 3.0
    """No further step is begun after so many seconds, once there are `min_timed_steps`."""
    precision: float = 0.01
    """Enough is when the 95% interval of the mean is within this fraction of it, to either side."""
    steps_at_once: int = 8
    """Ranks agree on how to go on after at most so many steps; agreeing costs a synchronization."""
    long_step_seconds: float = 1.0
    """Longer steps are spared where fewer will do: see the next two."""
    long_step_precision: float = 0.02
    """One long step is enough where its micro-steps show that its 95% interval is within this fraction of it; 0 asks
    for more steps in any case."""
    long_loser_factor: float = 1.2
    """One long step is enough, too, where all of that interval is above so many times the best's: a loser need not be
    known closely. Far enough above, for a step may still be slower than those that would follow."""
    min_long_steps: int = 2
    """What is enough of long steps in place of `min_timed_steps`, where they agree; one more is where they have used up
    `timed_seconds`, for two that differ say next to nothing about their mean."""
    long_steps_agree: float = 0.005
    """Long steps agree when the longest exceeds the shortest by at most this fraction of their mean."""
    hopeless_step_seconds: float = 2.0
    """Steps that are shorter run whole; see `mid_step_rule`."""
    mid_step_factor: float = 1.5
    """How many times slower than the best a configuration must be to be given up in its first timed step, which is
    slower than those that follow."""
    zero3_mid_step_factor: float = 2.5
    """The same for stage 3, whose warm-up takes longer."""
    mid_step_seconds: float = 1.0
    """So long micro-steps are watched before a configuration is given up: what is slow at first is so for a time."""

    def warmup(self, zero_stage: int, compile: str = "off") -> int:
        """Steps of one configuration, by its stage and how it is compiled, that are left out in any case."""
        if zero_stage != 3:
            return self.warmup_steps
        if compile == "deepcompile":
            return self.deepcompile_zero3_warmup_steps
        return self.warmup_steps + self.zero3_extra_warmup_steps

    def next_steps(
        self,
        step_seconds: Sequence[float],
        best_step_seconds: float | None,
        micro_step_seconds: Sequence[float] = (),
    ) -> int:
        """How many more steps to run; 0 for enough.

        Args:
            step_seconds: all steps after the warm-up, as the slowest rank had them.
            best_step_seconds: what a step of this batch takes at the study's best throughput, if there is one.
            micro_step_seconds: of these steps, all micro-steps that don't close one.
        """
        count = len(step_seconds)
        if count == 0:
            return 1  # it tells whether these steps are long
        if count >= self.max_timed_steps:
            return 0
        if best_step_seconds is not None and is_hopeless(step_seconds, best_step_seconds):
            return 0
        cut = warmup_length(step_seconds)
        steady = step_seconds[cut:]
        spent, mean = math.fsum(step_seconds), statistics.fmean(steady)
        if mean > self.long_step_seconds:
            theirs = micro_step_seconds[cut * len(micro_step_seconds) // count :]
            return 0 if self._is_enough_of_long(steady, theirs, spent, best_step_seconds) else 1
        missing = self.min_timed_steps - len(steady)
        if missing <= 0 and (spent >= self.timed_seconds or self._is_precise(steady)):
            return 0
        if count < self.min_timed_steps - 1:  # behind so many it may be seen to be hopeless
            return min(self.min_timed_steps - 1, self.max_timed_steps) - count
        affordable = math.floor((self.timed_seconds - spent) / mean)
        return min(max(missing, 1, min(affordable, count)), self.steps_at_once, self.max_timed_steps - count)

    def mid_step_rule(
        self, *, zero_stage: int, gradient_accumulation_steps: int, best_step_seconds: float | None
    ) -> "MidStepRule | None":
        """What gives a configuration up within its first timed step.

        Args:
            best_step_seconds: see `next_steps`.

        Returns:
            None where there is no best to be slower than, or where too few micro-steps make a step.
        """
        if best_step_seconds is None or gradient_accumulation_steps < FEWEST_ACCUMULATED:
            return None
        factor = self.zero3_mid_step_factor if zero_stage == 3 else self.mid_step_factor
        return MidStepRule(
            gradient_accumulation_steps=gradient_accumulation_steps,
            limit_seconds=max(factor * best_step_seconds, self.hopeless_step_seconds),
            watched_seconds=self.mid_step_seconds,
        )

    def _is_enough_of_long(
        self,
        steady: Sequence[float],
        micro_step_seconds: Sequence[float],
        spent: float,
        best_step_seconds: float | None,
    ) -> bool:
        mean = statistics.fmean(steady)
        if len(steady) < self.min_long_steps:
            low, high = step_ci95(steady, micro_step_seconds)
            has_lost = best_step_seconds is not None and low > self.long_loser_factor * best_step_seconds
            precision = math.inf if has_lost and self.long_step_precision else self.long_step_precision
            return (high - low) / 2 <= precision * mean and not is_drifting(micro_step_seconds)
        if max(steady) - min(steady) <= self.long_steps_agree * mean:
            return True
        # Steps that get faster one by one may still be a warm-up; so many are seldom a coincidence, and a long one.
        falling = all(later < (1 - self.long_steps_agree) * one for one, later in itertools.pairwise(steady))
        fewest = MOST_FALLING_STEPS if falling else self.min_long_steps + 1
        return len(steady) >= fewest and spent >= self.timed_seconds

    def _is_precise(self, steady: Sequence[float]) -> bool:
        low, high = mean_ci95(steady)
        return (high - low) / 2 <= self.precision * statistics.fmean(steady) and not is_drifting(steady)


PRECISE = StepPlan(
    timed_seconds=6.0, long_step_seconds=2.0, long_step_precision=0.0, min_long_steps=3, long_steps_agree=0.02
)
"""For what is to be compared closely: runs of the verification, and benchmarks."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MidStepRule:
    """When a configuration is given up before one of its steps is whole: a hopeless step can take a minute.

    It looks at micro-steps alone, without the one that closes the step: it reduces gradients and runs the optimizer. So
    a step's seconds are estimated too low rather than too high. All arguments named `micro_step_seconds` are those of
    the step from its begin, in order.
    """

    gradient_accumulation_steps: int
    limit_seconds: float
    """Of a whole step; only what takes longer beyond reasonable doubt is given up."""
    watched_seconds: float
    """See `StepPlan.mid_step_seconds`."""

    def is_due(self, count: int) -> bool:
        """Whether the ranks are to agree behind so many micro-steps: seldom, since it costs a synchronization."""
        rounds, rest = divmod(count - SETTLING_MICRO_STEPS, FEWEST_MICRO_STEPS)
        return rest == 0 and rounds > 0 and rounds & (rounds - 1) == 0  # 1, 2, 4, 8, …

    def is_hopeless(self, micro_step_seconds: Sequence[float]) -> bool:
        """Whether whole steps would be too long, by the test of `is_hopeless`, from the later half of the micro-steps.

        Args:
            micro_step_seconds: as the slowest rank had them.
        """
        watched = micro_step_seconds[SETTLING_MICRO_STEPS:]
        if math.fsum(watched) < self.watched_seconds:
            return False
        if self.gradient_accumulation_steps * min(watched) > FAR_BEYOND * self.limit_seconds:
            return True
        if is_drifting(watched) and watched[-1] < watched[0]:
            return False
        steps = [self.gradient_accumulation_steps * seconds for seconds in later_half(micro_step_seconds)]
        return _is_above(steps, self.limit_seconds)

    def step_seconds(self, micro_step_seconds: Sequence[float]) -> float:
        """What a whole step would take."""
        return self.gradient_accumulation_steps * statistics.fmean(later_half(micro_step_seconds))


Values = TypeVar("Values")


def later_half(micro_steps: Sequence[Values]) -> Sequence[Values]:
    """Of a trial's micro-steps, less the first that say nothing: those that an estimate is made from."""
    settled = micro_steps[SETTLING_MICRO_STEPS:]
    return settled[len(settled) // 2 :]


def is_hopeless(step_seconds: Sequence[float], best_step_seconds: float) -> bool:
    """Whether steps are slower than the best's beyond reasonable doubt, so that timing on is a waste.

    One-sided t-test of the mean at p ≤ 0.01 against the best and `HOPELESS_MARGIN`, which stands for what two runs of
    one configuration differ by. A warm-up that goes on must not look like a slow configuration: even the fastest
    step must be slower, and steps that still get faster prove nothing.
    """
    return _is_above(step_seconds, best_step_seconds * (1 + HOPELESS_MARGIN))


def _is_above(step_seconds: Sequence[float], limit: float) -> bool:
    """See `is_hopeless`."""
    steady = step_seconds[warmup_length(step_seconds) :]
    if len(steady) < 3 or min(step_seconds) <= limit:
        return False
    last = step_seconds[-max(len(step_seconds) // 4, 1) :]  # of many, a single one is mostly noise
    if statistics.fmean(last) < FALLING * statistics.fmean(step_seconds):
        return False
    size = effective_size(steady)
    error = statistics.stdev(steady) / math.sqrt(size)
    return statistics.fmean(steady) - limit > student_quantile(T98, size) * error
