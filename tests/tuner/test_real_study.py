"""Whole studies with real DeepSpeed on two CPU ranks: killed, interrupted, out of memory, on a terminal."""

import fcntl
import json
import os
import pty
import re
import selectors
import signal
import subprocess
import sys
import termios
import time
import uuid
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

import jsonschema
import pytest

from ds_tune.storage.layout import ResultsFolder
from ds_tune.storage.study_store import StudyStore

pytestmark = pytest.mark.slow

BRIEFLY_VERIFYING = """
import sys
from ds_tune.tuner import __main__, verification
verification.BUDGET_SECONDS = 0.0
sys.exit(__main__.run())
"""
"""The command, whose verification goes on for as long as the search took, and not for two minutes at least: trials of
a few milliseconds a step are hard to tell apart."""

TUNE = [sys.executable, "-P", "-c", BRIEFLY_VERIFYING, "--gpus", "0", "--seq-len", "32"]
SHORT_TRIALS = ["--max-micro-batch", "2", "--max-global-batch", "8"]
LONG_TRIALS = ["--global-batch", "128"]
"""Long enough that a second signal comes before the end of the trial on any machine."""

DEADLINE_SECONDS = 180
"""For anything that takes seconds on an idle machine."""

MARK = "DS_TUNE_TEST"
Start: TypeAlias = Callable[..., subprocess.Popen[bytes]]


class Marked:
    """Every process that a test's tuners started, found by a variable of their environment."""

    def __init__(self) -> None:
        self.value = uuid.uuid4().hex

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, MARK: self.value, "TERM": "xterm-256color", "COLUMNS": "120"}

    def alive(self) -> list[str]:
        """The command lines of those that run; zombies have none."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.value}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found

    def assert_none_left(self) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self.alive():
            assert time.monotonic() < deadline, self.alive()
            time.sleep(0.05)


@pytest.fixture
def marked() -> Marked:
    return Marked()


@pytest.fixture
def start(tmp_path: Path, marked: Marked) -> Iterator[Start]:
    """Starts the real command with its two outputs in one pipe."""
    started = []

    def run(*arguments: str, **streams: Any) -> subprocess.Popen[bytes]:
        streams = streams or {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen([*TUNE, *arguments], cwd=tmp_path, env=marked.environment, **streams)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    marked.assert_none_left()


def read_until(descriptor: int, pattern: str, *, so_far: str = "") -> str:
    """What came until the pattern did; with an empty pattern, until the other end was closed."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while not (pattern and re.search(pattern, so_far)):
            if not selector.select(deadline - time.monotonic()):
                pytest.fail(f"no {pattern!r} within {DEADLINE_SECONDS} s in: {so_far}")
            try:
                chunk = os.read(descriptor, 65536)
            except OSError:  # EIO: the terminal's last user has gone
                chunk = b""
            if not chunk:
                assert not pattern, f"ended without {pattern!r}: {so_far}"
                break
            so_far += chunk.decode(errors="replace")
    return so_far


def output_of(process: subprocess.Popen[bytes]) -> int:
    assert process.stdout is not None
    return process.stdout.fileno()


def run_json(start: Start, tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Runs to the end; the exit status, the document that is all of standard output, and standard error."""
    with (tmp_path / "document").open("w+b") as document, (tmp_path / "log").open("w+b") as log:
        status = start(*arguments, "--json", stdout=document, stderr=log).wait(5 * DEADLINE_SECONDS)
    study: dict[str, Any] = json.loads((tmp_path / "document").read_text())
    schema = json.loads(resources.files("ds_tune.tuner.reports").joinpath("study.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(study)
    return status, study, (tmp_path / "log").read_text()


def ranks_pinned_by(marked: Marked) -> list[str]:
    processes = [line for line in marked.alive() if "ds_tune.objectives.rank.fork_server" in line]
    return processes[1:]  # one of them is what the ranks are forked from


@pytest.mark.timeout(900)
def test_killed_during_a_trial_it_leaves_no_rank_and_goes_on(start: Start, marked: Marked, tmp_path: Path) -> None:
    results = ResultsFolder(tmp_path / "autotuning_results")
    process = start("--trials", "3", *SHORT_TRIALS)
    read_until(output_of(process), r"trial 2/3: (\S+)")
    while not ranks_pinned_by(marked):  # the second trial's own ranks
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    marked.assert_none_left()
    [first] = StudyStore.load(results.storage_url, None).records()

    status, study, log = run_json(start, tmp_path, "--trials", "3", *SHORT_TRIALS)
    assert status == 0
    assert study["state"] == "finished"
    assert study["trials"][0]["name"] == first.config.name == "z0_gas1_tmbspg1"
    assert len({trial["name"] for trial in study["trials"]}) == len(study["trials"]) == 3
    assert "was interrupted and runs again." in log
    assert "Study ds-tune goes on: 1 of 3 trials are done." in log
    for trial in study["trials"]:
        ranks, samples = study["hardware"]["ranks"], trial["global_batch_size"]
        config = trial["config"]
        assert samples == ranks * config["micro_batch_size"] * config["gradient_accumulation_steps"]
        low, high = trial["samples_per_second_ci95"]
        assert low < trial["samples_per_second"] < high
    marked.assert_none_left()

    # Finished: said, and no process is started, as the ranks' first log would show.
    rank_log = results.process_logs / "start.stderr.log"
    touched = rank_log.stat().st_mtime_ns
    status, again, log = run_json(start, tmp_path, "--trials", "3", *SHORT_TRIALS)
    assert (status, again) == (0, study)
    assert "Study ds-tune is finished (3 trials); --more M adds M trials." in log
    assert rank_log.stat().st_mtime_ns == touched


def test_ctrl_c_on_a_terminal_finishes_the_trial_and_can_be_resumed(
    start: Start, marked: Marked, tmp_path: Path
) -> None:
    controller, terminal = pty.openpty()
    process = start(
        "--trials",
        "2",
        *SHORT_TRIALS,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it as from a keyboard
    )
    os.close(terminal)
    output = read_until(controller, r"trial 1/2")
    os.write(controller, b"\x03")
    output = read_until(controller, "", so_far=output)
    os.close(controller)
    assert process.wait() == 130
    marked.assert_none_left()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output)
    # The live line, and above it the lines that stay.
    assert re.search(r"[━─]{6} trial 1/2  z0_gas1_tmbspg1  \d+ s  \S.*  about .* left", plain)
    assert "Stopping after this trial; Ctrl-C again stops now." in plain
    assert re.search(r"#0  z0_gas1_tmbspg1 +[\d.]+ ± [\d.]+ +[\d.]+  complete  ★ best so far", plain)
    assert "trial 2/2" not in plain
    assert "Interrupted; the same command goes on from here." in plain
    results = ResultsFolder(tmp_path / "autotuning_results")
    assert [record.state.value for record in StudyStore.load(results.storage_url, None).records()] == ["complete"]
    assert results.summary_markdown.exists()
    assert "- Not finished: 1 of 2 trials" in results.summary_markdown.read_text()


@pytest.mark.parametrize("signals", [[signal.SIGINT, signal.SIGINT], [signal.SIGTERM]], ids=["Ctrl-C twice", "SIGTERM"])
def test_stopping_now_leaves_no_rank_and_can_be_resumed(
    start: Start, marked: Marked, tmp_path: Path, signals: list[signal.Signals]
) -> None:
    process = start("--trials", "2", *LONG_TRIALS)
    output = read_until(output_of(process), r"trial 1/2")
    for count, number in enumerate(signals):
        if count:
            output = read_until(output_of(process), "Stopping after this trial", so_far=output)
        process.send_signal(number)
    output = read_until(output_of(process), "", so_far=output)
    assert process.wait(DEADLINE_SECONDS) == 130
    marked.assert_none_left()
    assert "Interrupted; the same command goes on from here." in output
    assert "Traceback" not in output
    results = ResultsFolder(tmp_path / "autotuning_results")
    store = StudyStore.load(results.storage_url, None)
    assert store.records() == []
    assert len(store.study.trials) == 1


def test_nothing_fits_under_a_small_cap(start: Start, marked: Marked, tmp_path: Path) -> None:
    status, study, log = run_json(start, tmp_path, "--trials", "9", "--memory-cap", "64MiB", *SHORT_TRIALS)
    assert status == 3, log
    assert (study["state"], study["best"]) == ("nothing_fits", None)
    assert [trial["name"] for trial in study["trials"]] == [f"z{stage}_gas1_tmbspg1" for stage in range(4)]
    assert {trial["state"] for trial in study["trials"]} == {"pruned"}
    assert "Nothing fits: not even one sample a rank fits" in log
    assert "however many there are; use a shorter --seq-len" in log
    marked.assert_none_left()
