"""`--metric` chooses what Optuna is told; the search and its ranking are the same for all."""

import csv
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_tune.objectives.metric import METRICS
from ds_tune.storage.layout import ResultsFolder
from ds_tune.storage.study_store import StudyStore
from ds_tune.tuner.cli import main

Tune = Callable[..., subprocess.CompletedProcess[str]]


def load(results: Path) -> StudyStore:
    return StudyStore.load(ResultsFolder(results).storage_url, None)


def test_another_metric_is_told_to_optuna_and_the_search_stays_the_same(tune: Tune, tmp_path: Path) -> None:
    assert tune("--trials", "3", "--results", "plain").returncode == 0
    done = tune("--trials", "3", "--results", "tokens", "--metric", "tokens_per_second")
    assert (done.returncode, done.stderr) == (0, "")
    assert "The study maximises tokens/s." in done.stdout
    plain, tokens = load(tmp_path / "plain"), load(tmp_path / "tokens")
    assert (plain.study.metric_names, tokens.study.metric_names) == (["samples_per_second"], ["tokens_per_second"])
    # 32 tokens a sample.
    assert [trial.value for trial in tokens.study.trials] == pytest.approx(
        [32 * trial.value for trial in plain.study.trials if trial.value is not None]
    )
    assert [record.config for record in tokens.records()] == [record.config for record in plain.records()]
    document = json.loads(ResultsFolder(tmp_path / "tokens").study_json.read_text())
    assert (document["metric"], document["peak_flops_source"]) == ("tokens_per_second", None)
    with ResultsFolder(tmp_path / "tokens").trials_csv.open(newline="") as file:
        [first, *_] = csv.DictReader(file)
    assert float(first["tokens_per_second"]) == pytest.approx(32 * float(first["samples_per_second"]))


def test_the_console_shows_every_metric_of_the_best(tune: Tune) -> None:
    done = tune("--trials", "1")
    for metric in METRICS.values():
        assert metric.unit_on("cpu") in done.stdout
    assert "MFU is not known: this device's peak is not in the catalogue." in done.stdout


def test_mfu_on_a_cpu_is_refused_before_anything_runs(tune: Tune, tmp_path: Path) -> None:
    refused = tune("--metric", "mfu")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == (
        "ds-tune: --metric mfu: the peak FLOP/s of a CPU is not known; use --metric tflops_per_gpu\n"
    )
    assert not (tmp_path / "prepared").exists()


def test_a_metric_that_there_is_not_is_refused(tune: Tune) -> None:
    refused = tune("--metric", "samples")
    assert refused.returncode == 2
    assert "samples_per_second" in refused.stderr and refused.stderr.count("\n") == 1


def test_a_study_of_another_metric_is_refused(tune: Tune) -> None:
    assert tune("--trials", "1").returncode == 0
    refused = tune("--trials", "2", "--metric", "tokens_per_second")
    assert refused.returncode == 2
    assert refused.stderr.startswith(
        "ds-tune: study ds-tune maximises another metric (metric samples_per_second there, tokens_per_second here): "
    )


def test_mfu_can_be_maximised_on_imagined_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--hardware", "2xH100", "--simulate", "--trials", "3", "--metric", "mfu"]) == 0
    assert (
        "MFU is a share of 989 TFLOP/s, data sheet of H100, fp16. The study maximises MFU." in capsys.readouterr().out
    )
    store = load(tmp_path / "autotuning_results")
    assert store.study.metric_names == ["mfu, simulated"]
    values = [trial.value for trial in store.study.trials if trial.value is not None]
    assert values and all(0 < value < 1 for value in values)
    best = store.summary().fastest
    assert best is not None and store.study.best_trial.number == best.number
