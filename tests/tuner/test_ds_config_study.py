"""A study with a person's DeepSpeed file: the file as it stands is the yardstick, and stages may refuse it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_tune.storage.layout import ResultsFolder
from ds_tune.storage.records import StudySummary
from ds_tune.storage.study_store import StudyStore

Tune = Callable[..., "subprocess.CompletedProcess[str]"]

OPEN_SPACE = ["--gpus", "0", "--seq-len", "32"]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], list[str]]:
    """Writes a DeepSpeed file, and returns the option that names it."""

    def file(document: Any) -> list[str]:
        (tmp_path / "ds.json").write_text(json.dumps(document))
        return ["--ds-config", "ds.json"]

    return file


def summary_in(folder: Path) -> StudySummary:
    return StudyStore.load(ResultsFolder(folder / "autotuning_results").storage_url, None).summary()


OWN = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}


def test_file_as_it_stands_is_trial_0_and_untuned_training_at_its_batch_the_next(
    tune: Tune, write: Callable[[Any], list[str]], tmp_path: Path
) -> None:
    done = tune("--trials", "5", *write(OWN), space=OPEN_SPACE)
    assert done.returncode == 0, done.stderr
    summary = summary_in(tmp_path)
    assert [record.config.name for record in summary.records][:2] == ["z3_gas2_tmbspg4", "z0_gas8_tmbspg1"]
    assert summary.baseline is summary.records[0]
    assert {record.config.global_batch_size(2) for record in summary.records} == {16}
    assert "ZeRO-3, 4 × 2 × 2 = 16 samples a step; that is held, and --free-batch lets it go" in done.stdout
    report = (tmp_path / "autotuning_results" / "summary.md").read_text()
    assert "Throughput improvement over untuned training: " in report
    assert "× in the search (z0_gas8_tmbspg1)" in done.stdout


@pytest.mark.parametrize("letting", [["--free-batch"], ["--max-global-batch", "64"]], ids=str)
def test_global_batch_of_the_file_can_be_let_go(
    letting: list[str], tune: Tune, write: Callable[[Any], list[str]], tmp_path: Path
) -> None:
    assert tune("--trials", "3", *letting, *write(OWN), space=OPEN_SPACE).returncode == 0
    records = summary_in(tmp_path).records
    assert records[0].config.name == "z3_gas2_tmbspg4"
    assert {record.config.global_batch_size(2) for record in records} != {16}


def test_batch_that_the_file_leaves_to_the_trainer_is_searched(
    tune: Tune, write: Callable[[Any], list[str]], tmp_path: Path
) -> None:
    document = {"zero_optimization": {"stage": 2}, "train_batch_size": "auto", "bf16": {"enabled": True}}
    done = tune("--trials", "3", *write(document), space=OPEN_SPACE)
    assert "Precision: bf16, from --ds-config." in done.stdout
    summary = summary_in(tmp_path)
    assert summary.workload.dtype == "bf16"
    assert summary.records[0].config.name == "z2_gas1_tmbspg1"
    assert len({record.config.global_batch_size(2) for record in summary.records}) > 1


def test_global_batch_that_was_asked_for_is_the_yardstick_s(
    tune: Tune, write: Callable[[Any], list[str]], tmp_path: Path
) -> None:
    assert tune("--trials", "1", "--global-batch", "32", *write(OWN), space=OPEN_SPACE).returncode == 0
    assert [record.config.name for record in summary_in(tmp_path).records] == ["z3_gas4_tmbspg4"]
    refused = tune("--trials", "1", "--global-batch", "20", *write(OWN), space=OPEN_SPACE, fresh="other")
    assert refused.returncode == 2


def test_stages_that_deepspeed_refuses_are_left_out_and_the_study_goes_on(tune: Tune, tmp_path: Path) -> None:
    space = "[fixed]\nmicro_batch_size = 2\n[search]\ngradient_accumulation_steps = [1, 2]\n"
    (tmp_path / "space.toml").write_text(space)
    done = tune(
        "--trials", "9", "--space", "space.toml", "--sampler", "grid",
        answer="stages 2 and 3 are refused", space=OPEN_SPACE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = summary_in(tmp_path)
    assert sorted(record.config.zero_stage for record in summary.records) == [0, 0, 1, 1, 2, 3]
    assert summary.best is not None and summary.best.config.zero_stage == 0
    for stage in (2, 3):
        assert f"Stage {stage} left out: DeepSpeed refuses it there: rank 0 in engine: Assertion" in done.stdout


def test_baseline_that_deepspeed_refuses_gives_way_to_the_next_stage(tune: Tune, tmp_path: Path) -> None:
    done = tune("--trials", "3", answer="stage 0 is refused")
    assert done.returncode == 0, done.stderr
    summary = summary_in(tmp_path)
    assert [record.config.zero_stage for record in summary.records][:2] == [0, 1]
    assert summary.baseline is not None and summary.baseline.config.zero_stage == 1
    assert 0 not in [record.config.zero_stage for record in summary.records[1:]]


def test_own_stage_that_deepspeed_refuses_gives_way_to_another(
    tune: Tune, write: Callable[[Any], list[str]], tmp_path: Path
) -> None:
    done = tune("--trials", "3", *write(OWN), space=OPEN_SPACE, answer="stages 2 and 3 are refused")
    assert done.returncode == 0, done.stderr
    summary = summary_in(tmp_path)
    assert summary.baseline is not None and summary.baseline.config.name == "z0_gas8_tmbspg1"


def test_configuration_that_every_stage_refuses_is_the_user_s_to_correct(
    tune: Tune, write: Callable[[Any], list[str]], tmp_path: Path
) -> None:
    done = tune("--trials", "9", *write({"zero_optimization": {"stage": 2}}), answer="invalid")
    assert done.returncode == 2
    assert "DeepSpeed refuses the configuration, correct --ds-config: rank 0 in engine: Validation" in done.stderr
    stages = [record.config.zero_stage for record in summary_in(tmp_path).records]
    assert sorted(stages) == [0, 1, 2, 3]


@pytest.mark.slow
def test_prescaled_gradients_are_trained_at_the_stages_that_have_them(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"prescale_gradients": True}))
    (tmp_path / "space.toml").write_text(
        "[fixed]\nmicro_batch_size = 1\ngradient_accumulation_steps = 1\n[search]\nzero_stage = [0, 2]\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ds_tune.tuner", "--gpus", "0", "--ranks", "2", "--seq-len", "16", "--trials", "2",
         "--no-verify", "--ds-config", "ds.json", "--space", "space.toml", "--sampler", "grid"],
        cwd=tmp_path, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Stage 2 left out: DeepSpeed refuses it there: rank 0 in engine: AssertionError" in done.stdout
    optimal = json.loads((tmp_path / "autotuning_results" / "ds_config_optimal.json").read_text())
    assert optimal["zero_optimization"]["stage"] == 0
    assert optimal["prescale_gradients"] is True
