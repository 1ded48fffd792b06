"""Stages at which a person's script fails by itself leave the space, and the study goes on."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_tune.objectives.trial import Failure, FailureKind
from ds_tune.storage.records import TrialRecord
from ds_tune.tuner.stages import failing_stages

SCRIPTS = Path(__file__).parents[1] / "scripts"
NO_SYNC, INDEX = "AssertionError in no_sync, train.py:30", "IndexError in _init_weights, train.py:9"


@pytest.fixture
def make(make_record: Callable[..., TrialRecord]) -> Callable[..., TrialRecord]:
    """`make("z1_gas1_tmbspg1", 20.0)` for one that was timed, `make("z3_gas1_tmbspg1", INDEX)` for one that raised."""

    def record(name: str, end: float | str, kind: FailureKind = FailureKind.CRASH) -> TrialRecord:
        if not isinstance(end, str):
            return make_record(name, end)
        failed = make_record(name, kind=kind)
        assert isinstance(failed.outcome, Failure)
        return dataclasses.replace(failed, outcome=dataclasses.replace(failed.outcome, raised=end))

    return record


def test_stage_where_nothing_but_failures_of_the_script_ended_is_left_out(make: Callable[..., TrialRecord]) -> None:
    own = make("z1_gas1_tmbspg1", 20.0)
    refused = make("z2_gas2_tmbspg1", NO_SYNC, FailureKind.INVALID_CONFIG)
    assert failing_stages([own, make("z3_gas1_tmbspg1", INDEX), refused], own_stage=1) == {2: NO_SYNC, 3: INDEX}


def test_stage_where_others_ended_is_left_out_when_it_fails_twice_alike(make: Callable[..., TrialRecord]) -> None:
    ended = [make("z1_gas1_tmbspg1", 20.0), make("z2_gas1_tmbspg8", 30.0), make("z2_gas2_tmbspg4", NO_SYNC)]
    assert failing_stages([*ended, make("z2_gas4_tmbspg2", INDEX)], own_stage=1) == {}
    assert failing_stages([*ended, make("z2_gas4_tmbspg2", NO_SYNC)], own_stage=1) == {2: NO_SYNC}


@pytest.mark.parametrize(
    ("name", "end", "kind"),
    [
        ("z1_gas2_tmbspg1", INDEX, FailureKind.CRASH),  # its own stage
        ("z3_gas1_tmbspg1", "", FailureKind.CRASH),  # it was killed
        ("z3_gas1_tmbspg1", "", FailureKind.TIMEOUT),
        ("z3_gas1_tmbspg1", "OutOfMemoryError in forward, train.py:9", FailureKind.OUT_OF_MEMORY),
    ],
)
def test_other_failures_leave_no_stage_out(
    name: str, end: str, kind: FailureKind, make: Callable[..., TrialRecord]
) -> None:
    assert failing_stages([make("z1_gas1_tmbspg1", 20.0), make(name, end, kind)], own_stage=1) == {}


def test_script_that_has_trained_nowhere_is_at_fault_itself(make: Callable[..., TrialRecord]) -> None:
    assert failing_stages([make("z1_gas1_tmbspg1", INDEX), make("z3_gas1_tmbspg1", INDEX)], own_stage=1) == {}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_study_goes_on_without_a_stage_and_libraries_are_imported_under_the_variables_that_a_script_sets(
    tmp_path: Path,
) -> None:
    folder, results = tmp_path / "mine", tmp_path / "results"
    folder.mkdir()
    for name in ("stage_3_fails.py", "ds_cpu.json"):
        shutil.copy(SCRIPTS / name, folder)
    (folder / "space.toml").write_text("[search]\nzero_stage = [1, 3]\n")
    done = subprocess.run(
        [
            sys.executable, "-P", "-m", "ds_tune.tuner", "--gpus", "0", "--results", str(results), "--trials", "9",
            "--no-verify", "--space", "space.toml", "--max-micro-batch", "2", "--sampler", "grid", "--",
            "stage_3_fails.py", "--deepspeed_config", "ds_cpu.json",
        ],
        cwd=folder, capture_output=True, text=True, timeout=800,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "Stage 3 left out: the script fails there (IndexError in _init_weights, stage_3_fails.py:26)." in said
    document = json.loads((results / "summary.json").read_text())
    names = ["z1_gas4_tmbspg2", "z1_gas8_tmbspg1", "z3_gas8_tmbspg1"]
    assert [each["name"] for each in document["trials"]] == names
    # The second may be given up for its speed.
    assert [each["state"] == "failed" for each in document["trials"]] == [False, False, True]
    assert "every configuration of the space has been tried" in said
    assert not list(results.rglob("scratch"))
