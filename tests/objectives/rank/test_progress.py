"""How a rank tells the tuner where it stands."""

import json
import os
import subprocess
import sys
import time

from ds_tune.objectives.rank.progress import Progress
from ds_tune.objectives.running.protocol import Ready


def test_an_announced_phase_is_told_and_one_that_is_only_entered_is_remembered() -> None:
    read_end, write_end = os.pipe()
    progress = Progress(write_end)
    assert progress.phase == "start"
    progress.announce("engine", seconds=60)
    assert progress.phase == "engine"
    progress.enter("forward")
    assert progress.phase == "forward"
    progress.send(Ready())
    os.close(write_end)
    with os.fdopen(read_end) as events:
        assert [json.loads(line) for line in events] == [
            {"event": "phase", "phase": "engine", "seconds": 60},
            {"event": "ready"},
        ]


def test_the_pipe_ends_with_the_rank_although_processes_that_it_forked_or_started_live_on() -> None:
    code = """
import os, sys, time
from ds_tune.objectives.rank.progress import Progress
from ds_tune.objectives.running.protocol import Ready
progress = Progress(int(sys.argv[1]))
progress.send(Ready())
if os.fork() == 0:
    time.sleep(3600)
os.system("sleep 3600 &")
os.kill(os.getpid(), 9)
"""
    read_end, write_end = os.pipe()
    rank = subprocess.Popen([sys.executable, "-c", code, str(write_end)], pass_fds=[write_end], process_group=0)
    os.close(write_end)
    try:
        os.set_blocking(read_end, False)
        rank.wait()
        with os.fdopen(read_end, "rb") as events:
            assert events.read() == b'{"event": "ready"}\n'
            deadline = time.monotonic() + 60  # the forked process closes its copy when it first runs
            while (end := events.read()) is None and time.monotonic() < deadline:
                time.sleep(0.05)
            assert end == b"", "somebody still holds the pipe"
    finally:
        os.killpg(rank.pid, 9)
