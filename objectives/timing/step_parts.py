"""Optimizer steps put together from their parts, where whole ones are too long to be timed. Pure arithmetic."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Self

from ds_tune.objectives.timing.intervals import (
    T95,
    above_fastest,
    effective_size,
    is_drifting,
    student_quantile,
    warmup_length,
)

CLOSING_SPREAD = 0.1
"""Relative standard deviation of what the first and the closing micro-step take beyond two plain ones, where fewer
than three steps show it. Assumed, not measured: rather too much than too little."""

FEWEST_MICRO_STEPS = 4
"""Micro-steps of the shortest step that has parts: the first, two plain ones and the closing one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepParts:
    """Seconds of the micro-steps of steps that were closed after fewer micro-steps than a whole step has.

    A whole step is a first micro-step (ZeRO may gather what the optimizer has changed, and launching starts anew), one
    that closes it (with the reduction of gradients and the optimizer), and plain ones between. Only the mean of the
    plain ones is multiplied.
    """

    gradient_accumulation_steps: int
    """Micro-steps of a whole step."""
    first_seconds: tuple[float, ...]
    """Seconds of each step's first micro-step; the closing ones likewise."""
    plain_seconds: tuple[float, ...]
    """Seconds of the micro-steps between, in the order they ran."""
    closing_seconds: tuple[float, ...]
    settling_micro_steps: int = 0
    """Number of the first plain micro-steps that were not yet steady, and are left out."""

    @classmethod
    def of(cls, steps: Sequence[Sequence[float]], gradient_accumulation_steps: int) -> Self:
        """The parts of steps, given the seconds of all micro-steps of each."""
        assert steps and all(len(step) >= FEWEST_MICRO_STEPS for step in steps)
        plain = tuple(seconds for step in steps for seconds in step[1:-1])
        return cls(
            gradient_accumulation_steps=gradient_accumulation_steps,
            first_seconds=tuple(step[0] for step in steps),
            plain_seconds=plain,
            closing_seconds=tuple(step[-1] for step in steps),
            settling_micro_steps=warmup_length(plain),
        )

    @property
    def steady_seconds(self) -> tuple[float, ...]:
        """Seconds of the plain micro-steps that count."""
        return self.plain_seconds[self.settling_micro_steps :]

    @property
    def timed_seconds(self) -> float:
        """Seconds of everything that was run."""
        return math.fsum((*self.first_seconds, *self.plain_seconds, *self.closing_seconds))

    @property
    def micro_steps(self) -> int:
        """Number of micro-steps that were run."""
        return len(self.plain_seconds) + 2 * len(self.closing_seconds)

    @property
    def excess_seconds(self) -> float:
        """Mean seconds of a step's first and closing micro-step beyond those of two plain ones."""
        return statistics.fmean(self._ends_seconds()) - 2 * statistics.fmean(self.steady_seconds)

    @property
    def step_seconds(self) -> float:
        """Seconds of a whole step."""
        return whole_step(statistics.fmean(self._ends_seconds()), self.steady_seconds, self.gradient_accumulation_steps)

    @property
    def is_drifting(self) -> bool:
        """Whether the plain micro-steps that count go up or down over time."""
        return is_drifting(self.steady_seconds)

    def error_seconds(self, quantiles: Sequence[float] = T95) -> float:
        """Half-width of the interval of the mean whole step.

        The errors of the two means are independent, and each is widened for its own number of values.

        Args:
            quantiles: Student's, by degrees of freedom, of the interval that is wanted.
        """
        plain, ends = self.steady_seconds, self._ends_seconds()
        multiplied = self.gradient_accumulation_steps - 2
        size, spread = effective_size(plain), statistics.stdev(plain) if len(plain) > 1 else math.inf
        of_plain = student_quantile(quantiles, size) * multiplied * spread / math.sqrt(size)
        if len(ends) >= 3:
            of_ends = student_quantile(quantiles, len(ends)) * statistics.stdev(ends) / math.sqrt(len(ends))
        else:
            assumed = math.hypot(CLOSING_SPREAD * max(self.excess_seconds, 0.0), math.sqrt(2) * spread)
            of_ends = quantiles[-1] * assumed / math.sqrt(len(ends))
        return math.hypot(of_plain, of_ends)

    def ci95(self) -> tuple[float, float]:
        """The 95% confidence interval of the mean whole step, in seconds.

        No step is faster than as many of its fastest micro-steps.
        """
        mean, half = self.step_seconds, self.error_seconds()
        return above_fastest((mean - half, mean + half), self.gradient_accumulation_steps * min(self.steady_seconds))

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        fields = dict(document)
        for key in ("first_seconds", "plain_seconds", "closing_seconds"):
            fields[key] = tuple(fields[key])
        return cls(**fields)

    def _ends_seconds(self) -> list[float]:
        return [first + closing for first, closing in zip(self.first_seconds, self.closing_seconds, strict=True)]


def whole_step(ends: float, plain: Sequence[float], gradient_accumulation_steps: int) -> float:
    """Seconds of a whole step.

    Args:
        ends: seconds of its first and its closing micro-step together.
        plain: seconds of micro-steps like those between.
    """
    return ends + (gradient_accumulation_steps - 2) * statistics.fmean(plain)
