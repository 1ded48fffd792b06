"""Tells the tuner where this rank stands, and remembers it for the case that something fails there."""

import os

from ds_tune.objectives.running.protocol import Event, Notice, Phase, encode


class Progress:
    """The sending end of a rank's event pipe."""

    def __init__(self, event_fd: int) -> None:
        self._event_fd = event_fd
        # The tuner sees this rank's death by the pipe's end, so no child may hold a copy, forked or executed.
        os.set_inheritable(event_fd, False)
        os.register_at_fork(after_in_child=lambda: os.close(event_fd))
        self.phase = "start"

    def send(self, event: Event) -> None:
        """Sends one event, however long; only the rank's main thread does."""
        line = encode(event)
        while line:
            line = line[os.write(self._event_fd, line) :]

    def announce(self, phase: str, *, seconds: float) -> None:
        """Enters a phase and tells the tuner, for the live line; a phase that outlasts `seconds` is taken for hung."""
        self.enter(phase)
        self.send(Phase(phase=phase, seconds=seconds))

    def notice(self, text: str, *, seconds: float) -> None:
        """Tells the user a line, and the tuner that what follows may take this long."""
        self.send(Notice(text=text, seconds=seconds))

    def enter(self, phase: str) -> None:
        """Enters a phase that is too short to be worth an event: a part of one step."""
        self.phase = phase
