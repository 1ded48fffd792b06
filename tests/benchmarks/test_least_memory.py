"""The least memory that a configuration runs with: what the recorded runs say, and real ones on two CPU ranks."""

import importlib
import json
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "least_memory.py"
Run = Callable[..., subprocess.CompletedProcess[str]]
SMALL = ("runs.jsonl", "1/4/2/0", "--model", "gpt2-nano", "--gpus", "0")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("least_memory")


def test_a_share_is_the_middle_of_what_the_runs_of_a_configuration_leave_open(script: ModuleType) -> None:
    """GPT2-xl, ZeRO-1, micro-batch 16, checkpointed: peak 32.04 GiB; it ran out of 35.09, and ran in 35.82."""
    shares = script.lost_shares(BENCHMARKS / "data" / "fragments" / "1xH100.gpt2-xl.jsonl")
    assert len(shares) == 6
    assert shares[1] == pytest.approx(((35.09 + 35.82) / 2 - 32.04) / 3.88, abs=0.01)
    assert statistics.median(shares) == pytest.approx(0.9, abs=0.01)


def test_run_that_was_cut_off_gives_no_lost_share(script: ModuleType) -> None:
    path = BENCHMARKS / "data" / "fragments" / "1xH100.gpt2-medium.jsonl"
    names = [json.loads(text)["name"] for text in path.read_text().splitlines()[1:]]
    assert len(set(names)) == len(script.lost_shares(path)) + 1
    assert names.count("z0_ac1_gas1_tmbspg16") == 1


def test_each_cap_is_in_the_middle_of_what_is_open(run_script: Run, tmp_path: Path) -> None:
    done = run_script(SCRIPT, *SMALL)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(text) for text in (tmp_path / "runs.jsonl").read_text().splitlines()[1:]]
    low, high = rows[0]["predicted_gib"], 1.18 * rows[0]["predicted_gib"]
    assert len(rows) == 3
    for row in rows:
        assert row["cap_gib"] == pytest.approx((low + high) / 2)
        low, high = (row["cap_gib"], high) if row["oom"] else (low, row["cap_gib"])
    assert rows[0]["name"] == "z1_gas2_tmbspg4" and rows[0]["name"] in done.stdout
    # The same command has nothing left to run.
    before = (tmp_path / "runs.jsonl").read_text()
    assert run_script(SCRIPT, *SMALL).stdout == done.stdout
    assert (tmp_path / "runs.jsonl").read_text() == before
    # Another model's runs don't belong into that file.
    other = run_script(SCRIPT, *SMALL[:2], "--model", "gpt2", "--gpus", "0")
    assert other.returncode == 2 and "was recorded on something else" in other.stderr


def test_least_memory_script_refuses_a_malformed_configuration_in_one_sentence(run_script: Run) -> None:
    done = run_script(SCRIPT, "runs.jsonl", "1/16/4")
    assert done.returncode == 2
    assert "1/16/4 is not STAGE/MBS/GAS/CKPT, such as 1/16/4/1" in done.stderr


def test_caps_are_derived_only_for_models_whose_losses_are_recorded(run_script: Run) -> None:
    surface = BENCHMARKS / "data" / "1xH100.gpt2-large-512.24GiB.jsonl"
    for script in ("search.py", "memory_model.py"):
        done = run_script(BENCHMARKS / script, str(surface), "--seeds", "1", "--cap", "20")
        assert done.returncode == 2
        assert "--cap needs what gpt2-large loses to fragments" in done.stderr
