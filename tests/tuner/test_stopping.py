"""What signals do to a study: asked once it finishes its trial, asked twice it ends; what is ignored stays ignored."""

import os
import signal

import pytest

from tuner.stopping import StopNow, StopSignals

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def send(number: int) -> None:
    """A signal to this process, which Python has handled when this returns."""
    os.kill(os.getpid(), number)


def test_the_first_interrupt_asks_and_the_second_ends() -> None:
    told: list[str] = []
    with StopSignals(lambda: told.append("after this trial")) as stop:
        send(signal.SIGINT)
        assert (stop.requested, told) == (True, ["after this trial"])
        with pytest.raises(StopNow, match="SIGINT"):
            send(signal.SIGINT)
    assert told == ["after this trial"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_at_once(number: signal.Signals) -> None:
    with StopSignals(lambda: None) as stop, pytest.raises(StopNow, match=number.name):
        send(number)
    assert stop.requested


@pytest.mark.parametrize("number", ALL)
def test_what_nohup_or_a_shell_has_us_ignore_stays_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignals(lambda: None) as stop:
            send(number)
            assert not stop.requested
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_behind_it_the_signals_are_what_they_were() -> None:
    before = [signal.getsignal(number) for number in ALL]
    with StopSignals(lambda: None):
        pass
    assert [signal.getsignal(number) for number in ALL] == before
