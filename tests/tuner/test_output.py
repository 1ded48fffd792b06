"""Terminals and pipes that cannot show all characters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SURFACE = Path(__file__).parents[2] / "benchmarks/data/1xH200.gpt2-xl.jsonl"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_terminal_lacks_is_replaced(tmp_path: Path, encoding: str) -> None:
    for words in (["--replay", str(SURFACE), "--trials", "2", "--no-verify"], ["report"]):
        finished = subprocess.run(
            [sys.executable, "-P", "-m", "ds_tune.tuner", *words],
            cwd=tmp_path, env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, timeout=120,
        )  # fmt: skip
        text = finished.stdout.decode(encoding)
        assert finished.returncode == 0, finished.stderr
        assert "H200" in text and "?" not in text
        assert ("±" in text) == (encoding == "latin-1")
