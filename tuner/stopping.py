"""Effect of Ctrl-C and the termination signals on a running study."""

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self


class StopNow(BaseException):
    """Raised where the main thread stands when the study is to end without finishing its trial.

    Like KeyboardInterrupt it is no Exception, so that nothing on the way takes it for a failed trial.
    """


class StopSignals:
    """While it is entered: the first SIGINT asks to finish the trial, the second, SIGTERM or SIGHUP end at once.

    What the tuner was started to ignore, such as SIGHUP under `nohup`, it goes on ignoring.
    """

    def __init__(self, on_first_interrupt: Callable[[], None]) -> None:
        self.requested = False
        self._on_first_interrupt = on_first_interrupt
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and not self.requested:
            self.requested = True
            self._on_first_interrupt()
            return
        self.requested = True
        raise StopNow(signal.Signals(number).name)
