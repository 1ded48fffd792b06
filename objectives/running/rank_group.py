"""The tuner's side of a group of ranks: start them, tell them what to run, watch them, end them.

`objectives.running.protocol` has the messages. Waiting costs no CPU: the tuner sleeps in `select` until a pipe has
something or closes.
"""

import contextlib
import dataclasses
import math
import selectors
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

from ds_tune.objectives.errors import EnvironmentFault, UsageError
from ds_tune.objectives.machine import GIB
from ds_tune.objectives.numerics import LossCurve
from ds_tune.objectives.objective import OnPhase
from ds_tune.objectives.running.failures import failure_of_deadline, failure_of_exit, root_cause
from ds_tune.objectives.running.launcher import Launcher, RankProcess
from ds_tune.objectives.running.protocol import (
    Command,
    Event,
    Failed,
    Finished,
    Learn,
    Losses,
    Notice,
    Phase,
    RankContext,
    RankResult,
    Ready,
    Refused,
    Released,
    Setup,
    Time,
    decode_event,
    encode,
)
from ds_tune.objectives.trial import Failure, FailureKind
from ds_tune.objectives.workload.script_facts import ScriptFacts

START_SECONDS = 180.0
"""A rank that has not said it is ready by then never will: imports take 4 to 16 s, rendezvous 2 s."""

PEER_GRACE_SECONDS = 2.0
"""After one rank failed, its peers get this long to say that they failed too, before they are killed."""

RELEASE_SECONDS = 60.0
"""Destroying the largest engine and collecting its objects takes a second or two."""

LEFT_LIMIT_BYTES = {"device": GIB // 4, "host": GIB}
"""A group whose ranks hold more than this beyond what they held after their first trial is replaced."""

LOG_TAIL_LINES = 25
LOG_TAIL_CHARACTERS = 4000

E = TypeVar("E", Ready, Refused, Finished, Failed, Released)


def ignore(text: str) -> None:
    """For whoever wants to hear of no phase, or no notice."""


@dataclasses.dataclass(slots=True)
class _Rank:
    """State of one rank as the tuner knows it."""

    started: RankProcess
    unread: bytes = b""
    """The beginning of a line whose end has not arrived."""
    phase: str = "start"
    phase_deadline: float = math.inf
    said: dict[type[Event], Event] = dataclasses.field(default_factory=dict)
    """The last event of each kind since the last command."""
    gone: bool = False

    def last(self, kind: type[E]) -> E | None:
        """The last event of a kind since the last command."""
        event = self.said.get(kind)
        assert event is None or isinstance(event, kind)
        return event

    def has_ended(self, endings: Collection[type[Event]]) -> bool:
        return self.gone or any(kind in self.said for kind in endings)

    @property
    def has_failed(self) -> bool:
        return self.gone or Failed in self.said or Refused in self.said


class RankGroup:
    """A started group of ranks. `kill()` it, whatever happens."""

    def __init__(
        self, launcher: Launcher, *, stdout: Path, stderr: Path, notice: Callable[[str], None] = ignore
    ) -> None:
        """
        Args:
            stdout, stderr: files for what ranks write before their first command.
            notice: told what a rank has to say to the user, in one line.
        """
        self._notice = notice
        self._processes = launcher.launch(stdout=stdout, stderr=stderr)
        self._ranks = [_Rank(started) for started in self._processes.ranks]
        self._dead = False
        self.left_bytes: Mapping[str, int] = dict.fromkeys(LEFT_LIMIT_BYTES, 0)
        """Memory that the rank that holds most holds beyond what it held after its first trial, on device and host."""
        self._deadline = math.inf

    def setup(self, context: RankContext, *, seconds: float = START_SECONDS) -> Failure | None:
        """Has every rank import, connect and check what it will need.

        Returns:
            Why the ranks never got ready, if they didn't.

        Raises:
            UsageError: a rank could not use what the user asked for.
            EnvironmentFault: a rank cannot run on this machine with this software.
        """
        self._send(Setup(context=context))
        timed_out = self._wait({Ready, Refused}, seconds=seconds)
        for rank in self._ranks:
            if (refusal := rank.last(Refused)) is not None:
                raise (UsageError if refusal.usage else EnvironmentFault)(refusal.message)
        if timed_out or any(rank.gone for rank in self._ranks):
            return self._failure(seconds, timed_out=timed_out)
        return None

    @overload
    def run(self, command: Time, *, seconds: float, on_phase: OnPhase) -> list[RankResult] | Failure: ...
    @overload
    def run(self, command: Losses, *, seconds: float, on_phase: OnPhase) -> list[LossCurve] | Failure: ...
    @overload
    def run(self, command: Learn, *, seconds: float, on_phase: OnPhase) -> list[ScriptFacts] | Failure: ...
    def run(
        self, command: Time | Losses | Learn, *, seconds: float, on_phase: OnPhase
    ) -> list[RankResult] | list[LossCurve] | list[ScriptFacts] | Failure:
        """Has all ranks carry out a command.

        Args:
            seconds: longest that it may take; ranks bound each phase more closely.

        Returns:
            Each rank's result, by rank; or the failure that explains why there are none.
        """
        self._processes.log_to(command.log_folder)
        self._send(command)
        started = time.monotonic()
        timed_out = self._wait({Finished, Failed}, seconds=seconds, on_phase=on_phase)
        finished = [event for rank in self._ranks if (event := rank.last(Finished)) is not None]
        if timed_out or len(finished) < len(self._ranks):
            return self._failure(time.monotonic() - started, timed_out=timed_out)
        results: list[Any] = [event.result for event in finished]
        return results

    def reason_to_replace(self) -> str | None:
        """Waits until the ranks gave back what the trial held; why they cannot run another one, or None if they can."""
        if self._dead:
            return "its processes were ended"
        timed_out = self._wait({Released}, seconds=RELEASE_SECONDS)
        released = [event for rank in self._ranks if (event := rank.last(Released)) is not None]
        if timed_out or any(rank.gone for rank in self._ranks):
            return "a rank did not give back what the trial held"
        if any(event.collectives != released[0].collectives for event in released):
            return "its ranks failed at different points"
        self.left_bytes = {kind: max(event.left_bytes[kind] for event in released) for kind in LEFT_LIMIT_BYTES}
        for kind, limit in LEFT_LIMIT_BYTES.items():
            if self.left_bytes[kind] > limit:
                return f"the trial left {self.left_bytes[kind] / GIB:.2f} GiB of {kind} memory behind"
        return None

    def kill(self) -> None:
        """Ends all ranks at once; none is left when this returns."""
        self._dead = True
        self._processes.kill()

    def _send(self, command: Command) -> None:
        line = encode(command)
        for rank in self._ranks:
            rank.said.clear()
            rank.phase = "start"
            rank.phase_deadline = math.inf
            # A rank that is already dead closed its end; its exit is seen and explained in _wait.
            with contextlib.suppress(BrokenPipeError):
                rank.started.commands.write(line)
                rank.started.commands.flush()

    def _wait(self, endings: Collection[type[Event]], *, seconds: float, on_phase: OnPhase = ignore) -> bool:
        """Handles events until every rank has said one of `endings` or is gone; True when time ran out."""
        self._deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            for rank in self._ranks:
                selector.register(rank.started.events, selectors.EVENT_READ, rank)
            while waiting := [rank for rank in self._ranks if not rank.has_ended(endings)]:
                failed = any(rank.has_failed for rank in self._ranks)
                deadline = self._deadline if failed else min(self._deadline, *(r.phase_deadline for r in waiting))
                left = deadline - time.monotonic()
                if left <= 0:
                    return not failed
                for key, _ in selector.select(left):
                    if not self._read_events(key.data, on_phase):
                        selector.unregister(key.fileobj)
                if not failed and any(rank.has_failed for rank in self._ranks):
                    # What one rank ran into, its peers wait for inside a collective until somebody kills them.
                    self._deadline = time.monotonic() + PEER_GRACE_SECONDS
        return False

    def _read_events(self, rank: _Rank, on_phase: OnPhase) -> bool:
        """Handles what a rank has sent; False when it is gone."""
        chunk = rank.started.events.read(65536)
        if not chunk:
            rank.gone = True
            return False
        *lines, rank.unread = (rank.unread + chunk).split(b"\n")
        for line in lines:
            event = decode_event(line)
            rank.said[type(event)] = event
            match event:
                case Phase():
                    if rank is self._ranks[0] and rank.phase != event.phase:
                        on_phase(event.phase)
                    rank.phase = event.phase
                    longest = math.inf if event.seconds is None else event.seconds
                    rank.phase_deadline = time.monotonic() + longest
                case Notice():
                    self._notice(event.text)
                    self._deadline = max(self._deadline, time.monotonic() + event.seconds)
        return True

    def _failure(self, seconds: float, *, timed_out: bool) -> Failure:
        """The one failure that explains what happened. The group lives on only where every rank ran out of memory."""
        evidence = {rank.started.rank: self._processes.evidence(rank.started.rank) for rank in self._ranks}
        if timed_out:
            self.kill()
            tail = _tail(evidence[self._ranks[0].started.rank].log_end)
            return failure_of_deadline(seconds, phases=[rank.phase for rank in self._ranks], log_tail=tail)
        failures = []
        for rank in self._ranks:
            number = rank.started.rank
            if (event := rank.last(Failed)) is not None:
                failures.append(event.failure)
            elif rank.gone:
                failures.append(
                    failure_of_exit(
                        rank.started.process.wait(),
                        rank=number,
                        phase=rank.phase,
                        log_tail=evidence[number].log_end,
                        host_oom_kills=evidence[number].oom_kills,
                    )
                )
        reported = [failure for failure in failures if failure.kind is FailureKind.OUT_OF_MEMORY]
        if len(reported) < len(self._ranks) or any(rank.gone for rank in self._ranks):
            self.kill()
        cause = root_cause(failures)
        return dataclasses.replace(cause, log_tail=_tail(evidence[cause.rank or 0].log_end))


def _tail(log_end: str) -> str:
    """Last lines of a log's end, as many as a person wants to see."""
    return "\n".join(log_end.splitlines()[-LOG_TAIL_LINES:])[-LOG_TAIL_CHARACTERS:]
