"""`--trials N` is the study's total and `--more M` adds to it, however often they are interrupted."""

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_tune.storage.layout import ResultsFolder
from ds_tune.storage.records import Source
from ds_tune.storage.study_store import StudyStore

Tune = Callable[..., subprocess.CompletedProcess[str]]


def finished_trials(folder: Path) -> int:
    results = ResultsFolder(folder / "autotuning_results")
    records = StudyStore.load(results.storage_url, None).records()
    assert len({record.config.name for record in records}) == len(records)
    # What an ablation found is a finalist, and none of the trials that were asked for.
    return sum(record.source is not Source.ABLATION for record in records)


def test_a_finished_study_says_so_and_starts_no_process(tune: Tune, tmp_path: Path) -> None:
    assert tune("--trials", "2").returncode == 0
    assert (tmp_path / "prepared").read_text().count("prepared") == 1
    written = ResultsFolder(tmp_path / "autotuning_results").trials_csv.read_bytes()
    again = tune("--trials", "2")
    assert again.returncode == 0
    assert "Study ds-tune is finished (2 trials); --more M adds M trials." in again.stdout
    assert (tmp_path / "prepared").read_text().count("prepared") == 1
    assert ResultsFolder(tmp_path / "autotuning_results").trials_csv.read_bytes() == written


def test_a_larger_total_continues_and_a_smaller_one_takes_nothing_away(tune: Tune, tmp_path: Path) -> None:
    assert tune("--trials", "1").returncode == 0
    larger = tune("--trials", "3")
    assert larger.returncode == 0
    assert "Study ds-tune goes on: 1 of 3 trials are done." in larger.stdout
    assert finished_trials(tmp_path) == 3
    smaller = tune("--trials", "2")
    assert smaller.returncode == 0
    assert "is finished (3 trials)" in smaller.stdout
    assert finished_trials(tmp_path) == 3


def test_more_adds_to_a_finished_study(tune: Tune, tmp_path: Path) -> None:
    assert tune("--trials", "1").returncode == 0
    assert tune("--more", "2").returncode == 0
    assert finished_trials(tmp_path) == 3


@pytest.mark.parametrize("point", ["running:2", "told:1", "told:2", "finished, not exported:1"])
def test_an_interrupted_more_does_not_add_twice(tune: Tune, tmp_path: Path, point: str) -> None:
    assert tune("--trials", "1").returncode == 0
    assert tune("--more", "2", kill=point).returncode == -signal.SIGKILL
    assert tune("--more", "2").returncode == 0
    assert finished_trials(tmp_path) == 3


def test_more_on_an_unfinished_study_goes_on_to_its_total(tune: Tune, tmp_path: Path) -> None:
    assert tune("--trials", "3", kill="running:2").returncode == -signal.SIGKILL
    assert tune("--more", "5").returncode == 0
    assert finished_trials(tmp_path) == 3


def test_a_crash_does_not_count(tune: Tune, tmp_path: Path) -> None:
    done = tune("--trials", "2", answer="first crashes")
    assert done.returncode == 0
    results = ResultsFolder(tmp_path / "autotuning_results")
    states = [record.state.value for record in StudyStore.load(results.storage_url, None).records()]
    assert states == ["failed", "complete", "complete"]


def test_an_exhausted_space_ends_the_study_and_says_so(tune: Tune, tmp_path: Path) -> None:
    space = ["--gpus", "0", "--seq-len", "32", "--max-micro-batch", "1", "--max-global-batch", "2"]
    done = tune("--trials", "9", space=space)
    assert done.returncode == 0
    assert finished_trials(tmp_path) == 4
    again = tune("--trials", "9", space=space)
    assert "is finished (4 trials, every configuration of the space has been tried)" in again.stdout
    assert (tmp_path / "prepared").read_text().count("prepared") == 1


@pytest.mark.parametrize(
    ("answer", "baseline"), [("formula", "z0_gas1_tmbspg1"), ("stage 0 does not fit", "z1_gas1_tmbspg1")]
)
def test_the_baseline_is_the_first_trial_and_falls_back_to_what_fits(
    tune: Tune, tmp_path: Path, answer: str, baseline: str
) -> None:
    assert tune("--trials", "3", answer=answer).returncode == 0
    summary = StudyStore.load(ResultsFolder(tmp_path / "autotuning_results").storage_url, None).summary()
    assert summary.records[0].config.name == "z0_gas1_tmbspg1"
    assert summary.baseline is not None and summary.baseline.config.name == baseline


def test_nothing_fits(tune: Tune, tmp_path: Path) -> None:
    done = tune("--trials", "9", answer="nothing fits")
    assert done.returncode == 3
    assert "Nothing fits: not even one sample a rank fits, in any ZeRO stage; --preset speed also" in done.stdout
    assert finished_trials(tmp_path) == 4


def test_nothing_has_fitted_as_far_as_was_asked(tune: Tune, tmp_path: Path) -> None:
    done = tune("--trials", "2", answer="nothing fits")
    assert done.returncode == 3
    assert "Nothing has fitted so far: none of 2 trials did; --more M tries M more." in done.stdout


def test_crashes_in_a_row_end_the_tuner_with_what_was_logged(tune: Tune, tmp_path: Path) -> None:
    done = tune("--trials", "9", answer="crash")
    assert done.returncode == 1
    assert "ds-tune: the last 3 trials failed, the last one with crash: rank 1 was killed by SIGSEGV" in done.stderr
    assert "the last line of the log" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_machine_that_crashed_is_not_said_to_have_too_little_memory(tune: Tune, tmp_path: Path) -> None:
    """Four baselines crashed; once the machine is mended, the same command finds the fastest configuration."""
    for _ in range(2):
        assert tune("--trials", "3", answer="crash").returncode == 1
    mended = tune("--trials", "3")
    assert mended.returncode == 0, mended.stdout
    summary = StudyStore.load(ResultsFolder(tmp_path / "autotuning_results").storage_url, None).summary()
    assert summary.finished_trials == 3


def test_a_configuration_that_deepspeed_refuses_is_the_users_to_correct(tune: Tune) -> None:
    done = tune("--trials", "9", answer="invalid")
    assert done.returncode == 2
    assert "DeepSpeed refuses the configuration, correct --ds-config: rank 0 in engine: Validation" in done.stderr
