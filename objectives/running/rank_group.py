"""The tuner's side of a group of ranks: start them, tell them what to run, watch them, end them.

The protocol, one JSON document a line. To each rank: first `{"command": "setup", …}`, then any number of
`{"command": "run", "config": …, "folder": …}`. From each rank: `{"event": "ready", …}` once it could run a trial,
or `{"event": "refused", …}` with a sentence for the user; during a trial `{"event": "phase", "phase": …}`; and at
its end `{"event": "finished"}` or `{"event": "failed"}`, after it wrote its result file; then
`{"event": "released", …}` once it gave back what the trial held. At any time `{"event": "notice", "text": …}`, a line
for the user. Waiting costs no CPU: the parent sleeps in `select` until a pipe has something or closes.
"""

import contextlib
import dataclasses
import json
import math
import selectors
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from ds_tune.objectives.errors import EnvironmentFault, UsageError
from ds_tune.objectives.files import result_file
from ds_tune.objectives.machine import GIB
from ds_tune.objectives.running.failures import failure_of_deadline, failure_of_exit, host_oom_kills, root_cause
from ds_tune.objectives.running.launcher import Launcher, RankProcess
from ds_tune.objectives.trial import Failure, FailureKind

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

EVIDENCE_LINES = 400
EVIDENCE_CHARACTERS = 40_000
"""How far back the last words of a rank are looked for, behind which its peers wrote their tracebacks."""

OnPhase = Callable[[str], None]


def ignore(text: str) -> None:
    """For whoever wants to hear of no phase, or no notice."""


@dataclasses.dataclass(slots=True)
class _Rank:
    """What is known of one rank."""

    started: RankProcess
    unread: bytes = b""
    """The beginning of a line whose end has not arrived."""
    phase: str = "start"
    phase_deadline: float = math.inf
    said: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """The last event of each name since the last command."""
    gone: bool = False

    def has_ended(self, endings: Collection[str]) -> bool:
        return self.gone or any(event in self.said for event in endings)

    @property
    def has_failed(self) -> bool:
        return self.gone or "failed" in self.said or "refused" in self.said


class RankGroup:
    """A started group of ranks. `kill()` it, whatever happens."""

    def __init__(
        self, launcher: Launcher, *, stdout: Path, stderr: Path, notice: Callable[[str], None] = ignore
    ) -> None:
        """
        Args:
            notice: told what a rank has to say to the user, in one line.
        """
        self._notice = notice
        self._stderr = stderr
        self._stdout = stdout
        self._processes = launcher.launch(stdout=stdout, stderr=stderr)
        self._ranks = [_Rank(started) for started in self._processes.ranks]
        self._dead = False
        self.left_bytes: Mapping[str, int] = dict.fromkeys(LEFT_LIMIT_BYTES, 0)
        """What the rank that holds most holds beyond what it held after its first trial, on device and host."""
        self._deadline = math.inf
        self._oom_kills = host_oom_kills()

    def setup(self, setup: Mapping[str, Any], *, seconds: float = START_SECONDS) -> dict[str, Any] | Failure:
        """Has every rank import, connect and check what it will need.

        Returns:
            What rank 0 found out about the model and the machine; or why the ranks never got ready.

        Raises:
            UsageError: a rank could not use what the user asked for.
            EnvironmentFault: a rank cannot run on this machine with this software.
        """
        self._send({"command": "setup", **setup})
        timed_out = self._wait({"ready", "refused"}, seconds=seconds)
        for rank in self._ranks:
            if (refusal := rank.said.get("refused")) is not None:
                raise (UsageError if refusal["usage"] else EnvironmentFault)(refusal["message"])
        if timed_out or any(rank.gone for rank in self._ranks):
            return self._failure(seconds, timed_out=timed_out, folder=None)
        return self._ranks[0].said["ready"]

    def run(
        self, command: Mapping[str, Any], folder: Path, *, seconds: float, on_phase: OnPhase
    ) -> list[dict[str, Any]] | Failure:
        """Runs one trial on all ranks.

        Args:
            command: what the ranks' `run` takes, less its folder.
            seconds: the longest that the trial may take; its ranks bound each phase more closely.

        Returns:
            Each rank's result document, by rank; or the failure that explains why there are none.
        """
        self._stdout, self._stderr = folder / "stdout.log", folder / "stderr.log"
        self._oom_kills = host_oom_kills()
        self._send({"command": "run", **command, "folder": str(folder)})
        started = time.monotonic()
        timed_out = self._wait({"finished", "failed"}, seconds=seconds, on_phase=on_phase)
        if timed_out or not all("finished" in rank.said for rank in self._ranks):
            return self._failure(time.monotonic() - started, timed_out=timed_out, folder=folder)
        return [json.loads(result_file(folder, rank.started.rank).read_text()) for rank in self._ranks]

    def reason_to_replace(self) -> str | None:
        """Waits until the ranks gave back what the trial held; why they cannot run another one, or None if they can."""
        if self._dead:
            return "its processes were ended"
        timed_out = self._wait({"released"}, seconds=RELEASE_SECONDS)
        if timed_out or any(rank.gone for rank in self._ranks):
            return "a rank did not give back what the trial held"
        released = [rank.said["released"] for rank in self._ranks]
        if any(document["collectives"] != released[0]["collectives"] for document in released):
            return "its ranks failed at different points"
        self.left_bytes = {
            kind: max(document["left_bytes"][kind] for document in released) for kind in LEFT_LIMIT_BYTES
        }
        for kind, limit in LEFT_LIMIT_BYTES.items():
            if self.left_bytes[kind] > limit:
                return f"the trial left {self.left_bytes[kind] / GIB:.2f} GiB of {kind} memory behind"
        return None

    def kill(self) -> None:
        """Ends all ranks at once; none is left when this returns."""
        self._dead = True
        self._processes.kill()

    def _send(self, command: Mapping[str, Any]) -> None:
        line = json.dumps(command).encode() + b"\n"
        for rank in self._ranks:
            rank.said.clear()
            rank.phase = "start"
            rank.phase_deadline = math.inf
            # A rank that is already dead closed its end; its exit is seen and explained in _wait.
            with contextlib.suppress(BrokenPipeError):
                rank.started.commands.write(line)
                rank.started.commands.flush()

    def _wait(self, endings: Collection[str], *, seconds: float, on_phase: OnPhase = ignore) -> bool:
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
            document = json.loads(line)
            rank.said[document["event"]] = document
            if document["event"] == "phase":
                if rank is self._ranks[0] and rank.phase != document["phase"]:
                    on_phase(document["phase"])
                rank.phase = document["phase"]
                rank.phase_deadline = time.monotonic() + document.get("seconds", math.inf)
            elif document["event"] == "notice":
                self._notice(document["text"])
                self._deadline = max(self._deadline, time.monotonic() + document.get("seconds", 0))
        return True

    def _failure(self, seconds: float, *, timed_out: bool, folder: Path | None) -> Failure:
        """The one failure that explains what happened. The group lives on only where every rank ran out of memory."""
        tail = self._log_end(LOG_TAIL_LINES, LOG_TAIL_CHARACTERS)
        if timed_out:
            self.kill()
            return failure_of_deadline(seconds, phases=[rank.phase for rank in self._ranks], log_tail=tail)
        evidence = self._log_end(EVIDENCE_LINES, EVIDENCE_CHARACTERS)
        kills = host_oom_kills() - self._oom_kills
        failures = []
        for rank in self._ranks:
            number = rank.started.rank
            if "failed" in rank.said and folder is not None:
                failures.append(Failure.from_json(json.loads(result_file(folder, number).read_text())))
            elif rank.gone:
                returncode = rank.started.process.wait()
                failures.append(
                    failure_of_exit(returncode, rank=number, phase=rank.phase, log_tail=evidence, host_oom_kills=kills)
                )
        reported = [failure for failure in failures if failure.kind is FailureKind.OUT_OF_MEMORY]
        if len(reported) < len(self._ranks) or any(rank.gone for rank in self._ranks):
            self.kill()
        return root_cause(failures, log_tail=tail)

    def _log_end(self, lines: int, characters: int) -> str:
        """The last lines that the ranks wrote: standard error, or standard output where that is empty."""
        for path in (self._stderr, self._stdout):
            with contextlib.suppress(OSError):
                text = path.read_text(errors="replace").strip()
                if text:
                    return "\n".join(text.splitlines()[-lines:])[-characters:]
        return ""
