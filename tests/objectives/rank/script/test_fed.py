"""What optimizer steps were fed, added up by two real ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("two_ranks.py")
LENGTHS = [[[5, 3], [2]], [[4, 4], [6]]]
"""Tokens of the micro-batches of each step, by rank."""


def test_ranks_add_up_the_tokens_of_each_step(tmp_path: Path) -> None:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-P", str(SCRIPT), str(tmp_path), json.dumps(LENGTHS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # A mean step has 4 samples of 3 tokens.
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [[16 / 12, 8 / 12], [16 / 12]]
