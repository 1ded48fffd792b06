"""Which signals end a search, and which it was started to ignore."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tuner.stopping import StopNow, StopSignals

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Puts back what a test changed."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_ctrl_c_asks_and_the_second_stops() -> None:
    asked: list[bool] = []
    stop = StopSignals(lambda: asked.append(True))
    with pytest.raises(StopNow, match="SIGINT"), stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert (asked, stop.requested) == ([True], True)
        os.kill(os.getpid(), signal.SIGINT)
    assert asked == [True]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_termination_signal_stops_at_once(number: signal.Signals) -> None:
    with pytest.raises(StopNow, match=number.name), StopSignals(lambda: None):
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_what_was_ignored_stays_ignored(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)
    stop = StopSignals(lambda: None)
    with stop:
        os.kill(os.getpid(), number)
    assert not stop.requested
    assert signal.getsignal(number) is signal.SIG_IGN


def test_the_handlers_before_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals(lambda: None):
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_search_under_nohup_outlives_its_terminal(
    tuning: Callable[..., subprocess.Popen[str]],
) -> None:
    process = tuning("--trials", "2", program=["nohup"])
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
