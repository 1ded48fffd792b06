"""How many steps a trial runs, decided from the step times so far: pure arithmetic, no clock and no torch."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence

from ds_tune.objectives.timing.intervals import (
    T98,
    effective_size,
    is_drifting,
    mean_ci95,
    student_quantile,
    warmup_length,
)
from ds_tune.objectives.timing.step_parts import FEWEST_MICRO_STEPS, StepParts, whole_step

HOPELESS_MARGIN = 0.05
"""Two runs of one configuration differ by 1 to 2%, by more where launching kernels decides; and what is within this of
the best runs again in the verification anyway."""

FALLING = 0.9
"""Last steps below this fraction of the mean say that steps still get faster."""

MOST_FALLING_STEPS = 6
"""Number of long steps that are enough also where they get faster one by one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """How long a trial is timed."""

    warmup_steps: int = 1
    """Steps that are left out in any case; `warmup_length` finds how many more were not yet steady."""
    zero3_extra_warmup_steps: int = 2
    """Stage 3 records which parameters to prefetch during its first steps, and those are slow."""
    deepcompile_zero3_warmup_steps: int = 6
    """Warm-up steps of DeepCompile at stage 3, in all: in its sixth step DeepSpeed compiles anew, to prefetch
    (`WARMUP` in deepspeed/compile/init_z3.py)."""
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
    """Longer steps are spared where less will do: see what follows."""
    long_trial_seconds: float = 8.0
    """No further long step is begun that would end later, of those that are timed."""
    short_step_seconds: float = 3.0
    """Long steps are put together from parts: after so many seconds of micro-steps a step is closed; 0 to time whole
    steps only. See `short_step`."""
    parts_precision: float = 0.02
    """Enough of short steps is when the 95% interval of a whole step is within this fraction of it, to either side."""
    loser_factor: float = 1.5
    """How many times slower than the best a configuration must be to be given up before three short steps show it. Far
    enough above, for a trial's first steps may be slower than those that would follow."""
    min_long_steps: int = 2
    """Steps that are enough in place of `min_timed_steps`, where steps are long and agree; one more is where they have
    used up `timed_seconds`, for two that differ say next to nothing about their mean."""
    single_step_seconds: float = math.inf
    """A whole step that takes longer is timed once: its micro-steps show how far steps lie apart."""
    long_steps_agree: float = 0.005
    """Long steps agree when the longest exceeds the shortest by at most this fraction of their mean."""

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
    ) -> int:
        """How many more whole steps to run; 0 for enough.

        Args:
            step_seconds: all steps after the warm-up, as the slowest rank had them.
            best_step_seconds: what a step of this batch takes at the study's best throughput, if there is one.
        """
        count = len(step_seconds)
        if count == 0:
            return 1  # it tells whether these steps are long
        if count >= self.max_timed_steps:
            return 0
        if best_step_seconds is not None and is_hopeless(step_seconds, best_step_seconds):
            return 0
        steady = step_seconds[warmup_length(step_seconds) :]
        spent, mean = math.fsum(step_seconds), statistics.fmean(steady)
        if mean > self.long_step_seconds:
            return 0 if self._is_enough_of_long(steady, spent) else 1
        missing = self.min_timed_steps - len(steady)
        if missing <= 0 and (spent >= self.timed_seconds or self._is_precise(steady)):
            return 0
        if count < self.min_timed_steps - 1:  # behind so many it may be seen to be hopeless
            return min(self.min_timed_steps - 1, self.max_timed_steps) - count
        affordable = math.floor((self.timed_seconds - spent) / mean)
        return min(max(missing, 1, min(affordable, count)), self.steps_at_once, self.max_timed_steps - count)

    def short_step(
        self,
        *,
        gradient_accumulation_steps: int,
        micro_step_seconds: float,
        parts: StepParts | None,
        best_step_seconds: float | None,
    ) -> int:
        """How many micro-steps to close the next step after, where steps are put together from parts.

        Args:
            micro_step_seconds: of a plain micro-step, as the warm-up had it.
            parts: of the short steps so far, if there are any.
            best_step_seconds: see `next_steps`.

        Returns:
            0 for enough, and where whole steps are to be timed: they are short, or have too few micro-steps.
        """
        if gradient_accumulation_steps < FEWEST_MICRO_STEPS or self.short_step_seconds == 0:
            return 0
        step_seconds = gradient_accumulation_steps * micro_step_seconds
        if parts is not None:
            micro_step_seconds, step_seconds = statistics.fmean(parts.steady_seconds), parts.step_seconds
        if step_seconds <= self.long_step_seconds:
            return 0
        wanted = max(math.ceil(self.short_step_seconds / micro_step_seconds), FEWEST_MICRO_STEPS)
        if parts is not None:
            if self._is_enough_of_parts(parts) or self.is_hopeless(parts, best_step_seconds):
                return 0
            left = self.long_trial_seconds - parts.timed_seconds - max(parts.excess_seconds, 0.0)
            wanted = min(wanted, math.floor(left / micro_step_seconds))
        return min(wanted, gradient_accumulation_steps) if wanted >= FEWEST_MICRO_STEPS else 0

    def is_hopeless(self, parts: StepParts, best_step_seconds: float | None) -> bool:
        """Whether whole steps are slower than the best's beyond reasonable doubt; see the function of that name."""
        if best_step_seconds is None:
            return False
        proved = len(parts.closing_seconds) >= 3
        limit = best_step_seconds * (1 + HOPELESS_MARGIN if proved else self.loser_factor)
        steady = parts.steady_seconds
        fastest = whole_step(
            min(parts.first_seconds) + min(parts.closing_seconds), [min(steady)], parts.gradient_accumulation_steps
        )
        if fastest <= limit or is_falling(steady) or (parts.is_drifting and steady[-1] < steady[0]):
            return False
        return parts.step_seconds - limit > parts.error_seconds(T98)

    def _is_enough_of_parts(self, parts: StepParts) -> bool:
        if parts.is_drifting or is_falling(parts.steady_seconds):
            return False
        if parts.error_seconds() <= self.parts_precision * parts.step_seconds:
            return True
        return len(parts.closing_seconds) > self.min_long_steps and parts.timed_seconds >= self.timed_seconds

    def _is_enough_of_long(self, steady: Sequence[float], spent: float) -> bool:
        mean = statistics.fmean(steady)
        if len(steady) < self.min_long_steps:
            return mean > self.single_step_seconds
        if max(steady) - min(steady) <= self.long_steps_agree * mean or spent + mean > self.long_trial_seconds:
            return True
        # Steps that get faster one by one may still be a warm-up; so many are seldom a coincidence, and a long one.
        falling = all(later < (1 - self.long_steps_agree) * one for one, later in itertools.pairwise(steady))
        fewest = MOST_FALLING_STEPS if falling else self.min_long_steps + 1
        return len(steady) >= fewest and spent >= self.timed_seconds

    def _is_precise(self, steady: Sequence[float]) -> bool:
        low, high = mean_ci95(steady)
        return (high - low) / 2 <= self.precision * statistics.fmean(steady) and not is_drifting(steady)


PRECISE = StepPlan(
    timed_seconds=6.0,
    long_step_seconds=2.0,
    long_trial_seconds=120.0,
    short_step_seconds=0.0,
    min_long_steps=3,
    single_step_seconds=20.0,
    long_steps_agree=0.02,
)
"""Plan of runs that are compared closely, in the verification and in benchmarks: whole steps, and more of them."""


def is_hopeless(step_seconds: Sequence[float], best_step_seconds: float) -> bool:
    """Whether steps are slower than the best's beyond reasonable doubt, so that timing on is a waste.

    One-sided t-test of the mean at p ≤ 0.01 against the best and `HOPELESS_MARGIN`, which stands for what two runs of
    one configuration differ by. A warm-up that goes on must not look like a slow configuration: even the fastest
    step must be slower, and steps that still get faster prove nothing.
    """
    limit = best_step_seconds * (1 + HOPELESS_MARGIN)
    steady = step_seconds[warmup_length(step_seconds) :]
    if len(steady) < 3 or min(step_seconds) <= limit or is_falling(step_seconds):
        return False
    size = effective_size(steady)
    error = statistics.stdev(steady) / math.sqrt(size)
    return statistics.fmean(steady) - limit > student_quantile(T98, size) * error


def is_falling(values: Sequence[float]) -> bool:
    """Whether the last values are so much below the mean that a warm-up may still be going on."""
    last = values[-max(len(values) // 4, 1) :]  # of many, a single one is mostly noise
    return statistics.fmean(last) < FALLING * statistics.fmean(values)
