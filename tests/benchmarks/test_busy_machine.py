"""Scripted step times of a machine that somebody else uses, too: the right winner, and nothing that is no answer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "busy_machine.py"
LEAST_RIGHT = {"quiet": 1.0, "drift": 0.65, "bimodal": 0.85, "neighbour": 0.75, "all at once": 0.45}
"""Share of 120 seeded studies; the rules before named 100, 64, 47, 70 and 42% of 300 right
(docs/log/2026-11-27-busy-machine.md)."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    path = tmp_path_factory.mktemp("busy") / "busy.json"
    command = [sys.executable, str(SCRIPT), "--studies", "120", "--json", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return {row["noise"]: row for row in json.loads(path.read_text())}


@pytest.mark.parametrize("noise", LEAST_RIGHT)
def test_right_winner_is_named_under_noise(rows: dict[str, dict[str, float]], noise: str) -> None:
    assert rows[noise]["right"] >= LEAST_RIGHT[noise]


@pytest.mark.parametrize("noise", ["quiet", "bimodal", "neighbour"])
def test_speedup_intervals_that_are_given_hold_the_true_speedup(rows: dict[str, dict[str, float]], noise: str) -> None:
    assert rows[noise]["covered"] >= 0.9


def test_quiet_machine_needs_no_more_runs_than_two_rounds_of_the_finalists(rows: dict[str, dict[str, float]]) -> None:
    assert rows["quiet"]["runs"] < 4
    assert rows["quiet"]["told"] == 0
