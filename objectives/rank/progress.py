"""Tells the tuner where this rank stands, and remembers it for the case that something fails there."""

import json
import os
from typing import Any


class Progress:
    """The sending end of a rank's event pipe."""

    def __init__(self, event_fd: int) -> None:
        self._event_fd = event_fd
        # The tuner sees this rank's death by the pipe's end, so no child may hold a copy, forked or executed.
        os.set_inheritable(event_fd, False)
        os.register_at_fork(after_in_child=lambda: os.close(event_fd))
        self.phase = "start"

    def send(self, event: str, **fields: Any) -> None:
        """Sends one event; a line under PIPE_BUF bytes arrives whole."""
        os.write(self._event_fd, json.dumps({"event": event, **fields}).encode() + b"\n")

    def announce(self, phase: str, *, seconds: float) -> None:
        """Enters a phase and tells the tuner, for the live line; a phase that outlasts `seconds` is taken for hung."""
        self.enter(phase)
        self.send("phase", phase=phase, seconds=seconds)

    def notice(self, text: str, *, seconds: float) -> None:
        """Tells the user a line, and the tuner that what follows may take this long."""
        self.send("notice", text=text, seconds=seconds)

    def enter(self, phase: str) -> None:
        """Enters a phase that is too short to be worth an event: a part of one step."""
        self.phase = phase
