"""Which signals end a search, and which it was started to ignore."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ds_tune.tuner import cli
from ds_tune.tuner.stopping import StopNow, StopSignals

INTERRUPTED_IMPORT = """
import os, signal, sys

class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == "optuna":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, CtrlC())
"""

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
def test_signal_ignored_before_the_search_stays_ignored(number: signal.Signals) -> None:
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


@pytest.mark.parametrize("words", [["report"], ["--json"]])
def test_ctrl_c_while_the_command_is_still_imported_is_one_line(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED_IMPORT)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ds_tune.tuner", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "ds-tune: interrupted\n")


@pytest.mark.parametrize("point", ["backend_for", "make_spec", "run_study"])
def test_an_interruption_before_there_is_a_study_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], point: str
) -> None:
    monkeypatch.chdir(tmp_path)
    number = signal.SIGTERM if point == "run_study" else signal.SIGINT
    monkeypatch.setattr(cli, point, lambda *unused: os.kill(os.getpid(), number))
    assert cli.main(["--simulate", "--hardware", "2xH100", "--json"]) == 130
    assert capsys.readouterr() == ("", "ds-tune: interrupted\n")
