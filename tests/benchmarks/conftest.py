"""Runs a benchmark as a user does, and sees that no process of it is left."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

MARK = "DS_TUNE_TEST"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_script(tmp_path: Path) -> Run:
    """Takes the script and its options; it runs in the test's folder."""
    mark = uuid.uuid4().hex

    def left() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def run(script: Path, *options: str) -> subprocess.CompletedProcess[str]:
        # Neither the checkout nor the launcher's folder has to be on a path.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [sys.executable, script, *options],
            env={**environment, MARK: mark, "PATH": os.defpath},
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        deadline = time.monotonic() + 60
        while left() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left() == []
        return done

    return run
