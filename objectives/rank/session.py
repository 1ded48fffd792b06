"""The timing of a trial's optimizer steps, pushed by whoever owns the training loop."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

from ds_tune.objectives.rank.device import Meter
from ds_tune.objectives.rank.distributed import Peers
from ds_tune.objectives.rank.progress import Progress
from ds_tune.objectives.timing.schedule import Run, Step, Timed, Timing
from ds_tune.objectives.timing.step_parts import FEWEST_MICRO_STEPS, whole_step

Marks: TypeAlias = list[tuple[str, Any]]
"""Parts of a micro-step, each with the point in the device's time at which it begins; the last one is its end."""

MAX_SKIPPED_STEPS = 24
"""fp16's dynamic loss scale halves at each overflow; from 2^16 it cannot halve more often and still be one."""


class OverflowedError(RuntimeError):
    """Every step overflowed, so no whole optimizer step could be timed."""

    def __init__(self) -> None:
        super().__init__(f"{MAX_SKIPPED_STEPS} steps overflowed in fp16; try bf16 or a lower loss scale")


class StepNotes(Protocol):
    """What the owner of a loop knows of its steps beside their times.

    Asked of the steps since `forget` where the ranks agree on how to go on; the answers are the same on every rank.
    """

    def shares(self) -> Sequence[float]:
        """What each step trained on over what a mean one does; see `Step.evened`."""

    def forget(self) -> None:
        """Forgets the steps so far: another run of steps begins."""


MAX_LEFT_OUT = 24
"""Steps that may be left out beside as many as were asked for, before a script is said to have hardly any whole one."""


class TooFewWholeStepsError(RuntimeError):
    """Hardly any step had all of its samples."""

    def __init__(self) -> None:
        super().__init__("hardly any optimizer step has its whole batch: the data is too short, train on more of it")


class TimingSession:
    """Timing of one trial.

    The owner of the loop says what it is about to do (`enter`), when a micro-step has ended (`micro_step_done`) and
    when an optimizer step has (`step_done`), and trains on until that returns False. A step lasts from the end of the
    one before it, so that all the owner does in between, data loading too, is in it. Marks are points in the device's
    time; they are read only after as many steps as the schedule asked for, when the ranks agree on how to go on: timing
    adds no synchronization within those.
    """

    def __init__(
        self,
        timing: Timing,
        meter: Meter,
        peers: Peers,
        progress: Progress,
        *,
        notes: StepNotes | None = None,
        leaves_out: bool = False,
    ) -> None:
        """Begins at once: the owner is about to take the first optimizer step.

        Args:
            notes: of the steps; None where all of them are alike.
            leaves_out: some steps may turn out not to be whole; the ranks agree on which.
        """
        self.skipped_steps = 0
        """Steps that fp16 overflow skipped: they have no optimizer in them, and are left out."""
        self._gradient_accumulation_steps = timing.gradient_accumulation_steps
        self._schedule = timing.schedule()
        self._meter = meter
        self._peers = peers
        self._progress = progress
        self._notes = notes
        self._timed: Timed | None = None
        self._leaves_out = leaves_out
        self._taken: list[bool] = []
        self._is_whole: list[bool] = []
        self._marks: list[list[Marks]] = []
        """Marks of the steps since times were last read: a list a step, with an entry a micro-step."""
        self._micro_step: Marks = []
        self._begin(next(self._schedule))

    @property
    def micro_steps(self) -> int:
        """Micro-steps that the next optimizer step should have; an owner who cannot close one early takes all."""
        return self._run.micro_steps

    @property
    def phase(self) -> str:
        """Phase of the trial: warm-up or timed steps."""
        return self._run.phase

    def enter(self, part: str) -> None:
        """Says which part of a micro-step begins: data, forward, backward or step."""
        self._progress.enter(part)
        if part != "data":  # begins where the micro-step before ended
            self._micro_step.append((part, self._meter.mark()))

    def micro_step_done(self) -> None:
        """Says that a micro-step has ended, all of its parts included."""
        self._micro_step.append(("end", self._meter.mark()))
        self._marks[-1].append(self._micro_step)
        self._micro_step = []

    def step_done(self, *, skipped: bool, is_whole: bool = True) -> bool:
        """Says that an optimizer step has ended: after its last micro-step.

        Args:
            skipped: overflow kept the optimizer from running.
            is_whole: on this rank the step was like any other; those that were not are left out.

        Returns:
            Whether to train on.

        Raises:
            OverflowedError: the loss scale never settled.
            TooFewWholeStepsError: hardly any step was whole.
        """
        self._taken.append(not skipped)
        self._is_whole.append(is_whole)
        self.skipped_steps += skipped
        if self.skipped_steps > MAX_SKIPPED_STEPS:
            raise OverflowedError
        if self._taken.count(True) < self._run.steps:
            self._marks.append([])
            return True
        if self._leaves_out and self._take_out() < self._run.steps:
            self._progress.announce(self._run.phase, seconds=self._run.deadline_seconds)
            self._marks.append([])
            return True
        self._meter.synchronize()
        try:
            run = self._schedule.send(self._steps())
        except StopIteration as ended:
            self._timed = ended.value
            return False
        self._begin(run)
        return True

    def _take_out(self) -> int:
        """Leaves out the steps that were not whole on some rank; how many of the run are left.

        Only when all seem to be there: until then no rank waits for another.
        """
        broken = self._peers.slowest([float(not is_whole) for is_whole in self._is_whole])
        self._taken = [taken and not out for taken, out in zip(self._taken, broken, strict=True)]
        if sum(broken) > self._run.steps + MAX_LEFT_OUT:
            raise TooFewWholeStepsError
        return self._taken.count(True)

    @property
    def timed(self) -> Timed:
        """Result, once `step_done` has returned False."""
        assert self._timed is not None
        return self._timed

    def _begin(self, run: Run) -> None:
        self._run = run
        self._progress.announce(run.phase, seconds=run.deadline_seconds)
        self._meter.synchronize()
        self._peers.barrier()
        self._start = self._meter.mark()
        self._taken, self._is_whole, self._marks, self._micro_step = [], [], [[]], []
        if self._notes is not None:
            self._notes.forget()

    def _steps(self) -> list[Step]:
        """Times of the steps that were neither skipped nor left out."""
        starts = [self._start, *(step[-1][-1][1] for step in self._marks)]
        shares = [1.0] * len(self._taken) if self._notes is None else self._notes.shares()
        return [
            self._step(start, micro_steps).evened(share)
            for start, micro_steps, is_taken, share in zip(starts, self._marks, self._taken, shares, strict=False)
            if is_taken
        ]

    def _step(self, start: Any, micro_steps: Sequence[Marks]) -> Step:
        ends = [start, *(micro_step[-1][1] for micro_step in micro_steps)]
        return Step(
            seconds=self._meter.seconds(ends[0], ends[-1]),
            forward_seconds=self._part_seconds(micro_steps, "forward"),
            backward_seconds=self._part_seconds(micro_steps, "backward"),
            optimizer_seconds=self._part_seconds(micro_steps, "step"),
            micro_step_seconds=tuple(self._meter.seconds(one, other) for one, other in itertools.pairwise(ends)),
        )

    def _part_seconds(self, micro_steps: Sequence[Marks], part: str) -> float:
        """Seconds of a part in a whole step, of which some micro-steps may not have been run."""
        seconds = [
            math.fsum(
                self._meter.seconds(begin, end)
                for (name, begin), (_, end) in itertools.pairwise(micro_step)
                if name == part
            )
            for micro_step in micro_steps
        ]
        whole = self._gradient_accumulation_steps
        if len(seconds) >= whole or len(seconds) < FEWEST_MICRO_STEPS:
            return math.fsum(seconds)
        return whole_step(seconds[0] + seconds[-1], seconds[1:-1], whole)
