"""The process that leads the ranks' process group and kills it when the tuner is gone."""

import subprocess
import sys

import pytest

from ds_tune.objectives.running import guard


def start_guard() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-I", "-S", guard.__file__]
    return subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0)


def test_the_guard_kills_its_whole_group_when_the_tuner_s_end_closes() -> None:
    leader = start_guard()
    # Neither SIGTERM nor a closed terminal ends this one.
    deaf = subprocess.Popen(["sh", "-c", "trap '' TERM HUP INT; sleep 3600 & wait"], process_group=leader.pid)
    assert leader.stdin is not None
    leader.stdin.close()
    assert deaf.wait(timeout=60) == -9
    assert leader.wait(timeout=60) == -9


def test_the_guard_waits_as_long_as_the_tuner_lives() -> None:
    leader = start_guard()
    with pytest.raises(subprocess.TimeoutExpired):
        leader.wait(timeout=0.5)
    assert leader.stdin is not None
    leader.stdin.close()
    leader.wait(timeout=60)
