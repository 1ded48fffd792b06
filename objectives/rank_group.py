"""The tuner's side of a group of ranks: start them, tell them what to run, watch them, end them.

The protocol, one JSON document a line. To each rank: first `{"command": "setup", …}`, then any number of
`{"command": "run", "config": …, "folder": …}`. From each rank: `{"event": "ready", …}` once it could run a trial,
or `{"event": "refused", …}` with a sentence for the user; during a trial `{"event": "phase", "phase": …}`; and at
its end `{"event": "finished"}` or `{"event": "failed"}`, after it wrote its result file. Waiting costs no CPU:
the parent sleeps in `select` until a pipe has something or closes.
"""

import contextlib
import json
import selectors
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from objectives.errors import EnvironmentFault, UsageError
from objectives.failures import failure_of_deadline, failure_of_exit, host_oom_kills, root_cause
from objectives.files import result_file
from objectives.launcher import Launcher, RankProcess
from objectives.trial import Failure, TrialConfig

START_SECONDS = 180.0
"""A rank that has not said it is ready by then never will: imports take 4 to 13 s, rendezvous 2 s."""

PEER_GRACE_SECONDS = 2.0
"""After one rank failed, its peers get this long to say that they failed too, before they are killed."""

LOG_TAIL_LINES = 25
LOG_TAIL_CHARACTERS = 4000

EVIDENCE_LINES = 400
EVIDENCE_CHARACTERS = 40_000
"""How far back the last words of a rank are looked for, behind which its peers wrote their tracebacks."""

OnPhase = Callable[[str], None]


class RankGroup:
    """A started group of ranks. `kill()` it, whatever happens."""

    def __init__(self, launcher: Launcher, *, stdout: Path, stderr: Path) -> None:
        self._stderr = stderr
        self._stdout = stdout
        self._processes = launcher.launch(stdout=stdout, stderr=stderr)
        count = len(self._processes.ranks)
        self._phases = ["start"] * count
        self._buffers = [b""] * count
        self._ended: dict[int, str] = {}  # what ended each rank's present task: an event's name, or "exit"
        self._documents: dict[int, dict[str, Any]] = {}
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
        timed_out = self._wait({"ready", "refused"}, seconds=seconds, on_phase=lambda phase: None)
        for rank, how in sorted(self._ended.items()):
            if how == "refused":
                document = self._documents[rank]
                raise (UsageError if document["usage"] else EnvironmentFault)(document["message"])
        if timed_out or set(self._ended.values()) != {"ready"}:
            return self._failure(seconds, timed_out=timed_out, folder=None)
        return self._documents[0]

    def run(
        self, config: TrialConfig, folder: Path, *, seconds: float, on_phase: OnPhase
    ) -> list[dict[str, Any]] | Failure:
        """Runs one trial on all ranks.

        Returns:
            Each rank's result document, by rank; or the failure that explains why there are none.
        """
        self._stdout, self._stderr = folder / "stdout.log", folder / "stderr.log"
        self._oom_kills = host_oom_kills()
        self._phases = ["start"] * len(self._phases)
        self._send({"command": "run", "config": config.to_json(), "folder": str(folder)})
        timed_out = self._wait({"finished", "failed"}, seconds=seconds, on_phase=on_phase)
        if timed_out or set(self._ended.values()) != {"finished"}:
            return self._failure(seconds, timed_out=timed_out, folder=folder)
        return [json.loads(result_file(folder, rank.rank).read_text()) for rank in self._processes.ranks]

    def kill(self) -> None:
        """Ends all ranks at once; none is left when this returns."""
        self._processes.kill()

    def _send(self, command: Mapping[str, Any]) -> None:
        self._ended.clear()
        line = json.dumps(command).encode() + b"\n"
        for rank in self._processes.ranks:
            # A rank that is already dead closed its end; its exit is seen and explained in _wait.
            with contextlib.suppress(BrokenPipeError):
                rank.commands.write(line)
                rank.commands.flush()

    def _wait(self, endings: set[str], *, seconds: float, on_phase: OnPhase) -> bool:
        """Handles events until every rank's task has ended one way or another; True when time ran out."""
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            for rank in self._processes.ranks:
                selector.register(rank.events, selectors.EVENT_READ, rank)
            while len(self._ended) < len(self._processes.ranks):
                left = deadline - time.monotonic()
                if left <= 0:
                    return not self._has_failed()
                for key, _ in selector.select(left):
                    rank = key.data
                    if not self._read_events(rank, endings, on_phase):
                        selector.unregister(rank.events)
                if self._has_failed():
                    # What one rank ran into, its peers wait for inside a collective until somebody kills them.
                    deadline = min(deadline, time.monotonic() + PEER_GRACE_SECONDS)
        return False

    def _has_failed(self) -> bool:
        return any(how in ("failed", "refused", "exit") for how in self._ended.values())

    def _read_events(self, rank: RankProcess, endings: set[str], on_phase: OnPhase) -> bool:
        """Handles what a rank has sent; False when it is gone."""
        chunk = rank.events.read(65536)
        if not chunk:
            self._ended.setdefault(rank.rank, "exit")
            return False
        *lines, self._buffers[rank.rank] = (self._buffers[rank.rank] + chunk).split(b"\n")
        for line in lines:
            document = json.loads(line)
            event = document["event"]
            if event == "phase":
                self._phases[rank.rank] = document["phase"]
                if rank.rank == 0:
                    on_phase(document["phase"])
            elif event in endings:
                self._ended[rank.rank] = event
                self._documents[rank.rank] = document
        return True

    def _failure(self, seconds: float, *, timed_out: bool, folder: Path | None) -> Failure:
        """Ends the group and finds the one failure that explains what happened."""
        tail = self._log_end(LOG_TAIL_LINES, LOG_TAIL_CHARACTERS)
        if timed_out:
            self.kill()
            return failure_of_deadline(seconds, phases=self._phases, log_tail=tail)
        evidence = self._log_end(EVIDENCE_LINES, EVIDENCE_CHARACTERS)
        failures = []
        exits = host_oom_kills() - self._oom_kills
        exited = [rank for rank in self._processes.ranks if self._ended.get(rank.rank) == "exit"]
        returncodes = {rank.rank: rank.process.wait() for rank in exited}
        self.kill()
        for rank in self._processes.ranks:
            how = self._ended.get(rank.rank)
            if how == "failed" and folder is not None:
                failure = Failure.from_json(json.loads(result_file(folder, rank.rank).read_text()))
                failures.append(failure)
            elif how == "exit":
                failures.append(
                    failure_of_exit(
                        returncodes[rank.rank],
                        rank=rank.rank,
                        phase=self._phases[rank.rank],
                        log_tail=evidence,
                        host_oom_kills=exits,
                    )
                )
        return root_cause(failures, log_tail=tail)

    def _log_end(self, lines: int, characters: int) -> str:
        """The last lines that the ranks wrote: standard error, or standard output where that is empty."""
        for path in (self._stderr, self._stdout):
            with contextlib.suppress(OSError):
                text = path.read_text(errors="replace").strip()
                if text:
                    return "\n".join(text.splitlines()[-lines:])[-characters:]
        return ""
