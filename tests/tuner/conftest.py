"""Whole studies in a second, answered by a formula (`analytic_tune.py`), and the real commands."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import pytest

ANALYTIC_TUNE = [sys.executable, "-P", str(Path(__file__).parent / "analytic_tune.py")]
TUNER = [sys.executable, "-P", "-m", "ds_tune.tuner"]

# 4 stages × 8 pairs of batch sizes: small, so that a study can also be exhausted.
SPACE = ["--gpus", "0", "--seq-len", "32", "--max-micro-batch", "4", "--max-global-batch", "8"]

# readline, which pytest imports, tells processes started from it of a terminal's width.
NO_WIDTH = {name: value for name, value in os.environ.items() if name != "COLUMNS"}

# Most tests count trials: with this sampler a study has as many as it was asked for, unless it is exhausted.
SAMPLER = ["--sampler", "tpe"]

Finished: TypeAlias = subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def server() -> Iterator[subprocess.Popen[str]]:
    """Runs analytic tuners one after another, each in a process of its own."""
    with subprocess.Popen(
        [*ANALYTIC_TUNE, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=NO_WIDTH
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def tune(tmp_path: Path, server: subprocess.Popen[str]) -> Callable[..., Finished]:
    """Runs `tune` with the analytic objective in a folder of its own, on the space of `SPACE` unless told."""

    def run(
        *arguments: str, answer: str = "formula", kill: str | None = None, space: list[str] = SPACE, fresh: str = "."
    ) -> Finished:
        folder = tmp_path / fresh
        folder.mkdir(exist_ok=True)
        command = ["--answer", answer, "--prepared", str(tmp_path / "prepared")]
        sampler = SAMPLER if space and "--sampler" not in arguments else []
        command += [*(["--kill", kill] if kill else []), *arguments, *space, *sampler]
        stdout, stderr = tmp_path / ".stdout", tmp_path / ".stderr"
        request = {"arguments": command, "folder": str(folder), "stdout": str(stdout), "stderr": str(stderr)}
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(command, status, stdout.read_text(), stderr.read_text())

    return run


@pytest.fixture
def tuning(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `tune`, maybe by a `program`, with an objective that never answers; returns once its trial runs."""
    started = []

    def start(*arguments: str, program: Sequence[str] = ()) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*program, *ANALYTIC_TUNE, "--answer", "hang", *SPACE, *SAMPLER, *arguments],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("trial 1/"):
                return process
        pytest.fail("".join(lines))

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Finished]:
    """Runs a real command of ds-tune."""

    def run(*arguments: str) -> Finished:
        return subprocess.run(
            [*TUNER, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120, env=NO_WIDTH
        )

    return run
