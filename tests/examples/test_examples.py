"""The examples do what their comments say, with real DeepSpeed on two CPU ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[2]
EXAMPLES = CHECKOUT / "examples"

DEADLINE_SECONDS = 240
"""For a study that takes 20 to 50 s on two cores."""


def run(command: list[str | Path], folder: Path) -> str:
    """Runs an example in a folder of its own, with the ds-tune of this Python, and returns what it printed."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=DEADLINE_SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def summary_of(results: Path) -> dict[str, Any]:
    return json.loads((results / "summary.json").read_text())


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune_on_cpu")
    run([EXAMPLES / "tune_on_cpu.sh"], folder)
    return folder / "autotuning_results"


def test_each_example_is_in_the_readme() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    files = {path.name for path in EXAMPLES.iterdir()} - {"README.md"}
    assert files
    assert {file for file in files if f"]({file})" not in readme} == set()


@pytest.mark.slow
def test_tune_on_cpu_finishes_two_trials_and_writes_a_configuration(tuned: Path) -> None:
    summary = summary_of(tuned)
    assert summary["state"] == "finished"
    assert summary["hardware"]["device"] == "cpu"
    assert len(summary["trials"]) == 2
    written = json.loads((tuned / "ds_config_optimal.json").read_text())
    assert written["train_batch_size"] == summary["best"]["global_batch_size"]


@pytest.mark.slow
def test_open_study_prints_the_best_trial_first(tuned: Path) -> None:
    printed = run([sys.executable, EXAMPLES / "open_study.py", tuned], tuned.parent).splitlines()
    best = summary_of(tuned)["best"]
    assert printed[0].startswith(f"{best['samples_per_second']:.2f} samples/s, ")
    assert f"'micro_batch_size': {best['config']['micro_batch_size']}" in printed[0]
    assert len(printed) == sum(trial["state"] == "complete" for trial in summary_of(tuned)["trials"])


def test_open_study_without_a_study_says_so_in_one_sentence_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "open_study.py", "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "There is no study in none; name the results folder of one.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_own_space_tries_only_what_the_file_lists_and_the_constraints_allow(tmp_path: Path) -> None:
    run([EXAMPLES / "own_space.sh", "results"], tmp_path)
    summary = summary_of(tmp_path / "results")
    assert summary["state"] == "finished"
    for trial in summary["trials"]:
        config = trial["config"]
        assert config["activation_checkpointing"] == 1
        assert config["zero_stage"] in (1, 2, 3)
        assert config["micro_batch_size"] in (1, 2, 4)
        assert config["micro_batch_size"] * config["gradient_accumulation_steps"] <= 8
        assert config["zero_stage"] < 3 or config["micro_batch_size"] > 1


@pytest.mark.slow
def test_own_ds_config_keeps_its_other_settings_and_leaves_the_file_alone(tmp_path: Path) -> None:
    file = EXAMPLES / "ds_config.json"
    before = file.read_bytes()
    run([EXAMPLES / "own_ds_config.sh", "results"], tmp_path)
    assert file.read_bytes() == before
    own = json.loads(before)
    found = json.loads((tmp_path / "results" / "ds_config_optimal.json").read_text())
    best = summary_of(tmp_path / "results")["best"]
    assert found["gradient_clipping"] == own["gradient_clipping"]
    assert found["optimizer"]["params"].items() >= own["optimizer"]["params"].items()
    assert found["zero_optimization"]["reduce_bucket_size"] == own["zero_optimization"]["reduce_bucket_size"]
    assert found["zero_optimization"]["stage"] == best["config"]["zero_stage"]
    assert found["train_micro_batch_size_per_gpu"] == best["config"]["micro_batch_size"]
