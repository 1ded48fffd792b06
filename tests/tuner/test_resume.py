"""A tuner that is killed anywhere: the same command goes on, loses no finished trial and counts none twice."""

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from ds_tune.storage.layout import ResultsFolder
from ds_tune.storage.records import Source, StudySummary
from ds_tune.storage.study_store import StudyStore

Tune = Callable[..., subprocess.CompletedProcess[str]]
TRIALS = 3

# A point in the tuner's path and how often it is passed before the tuner is killed there.
LOSES_NOTHING = [
    "study created:1",
    "before the first trial:1",
    "configuration queued:1",
    "saved, not told:2",
    "step reported:7",
    "constraint set:2",
    "all told but the state:2",
    "told:2",
    f"told:{TRIALS}",
    "finished, not exported:1",
]
RUNS_AGAIN = [
    "asked, not yet run:2",
    "running:1",
    "running:2",
    "ranks wrote their results, nothing saved:2",
]


@pytest.fixture
def results(tmp_path: Path) -> ResultsFolder:
    return ResultsFolder(tmp_path / "autotuning_results")


def summary(results: ResultsFolder) -> StudySummary:
    return StudyStore.load(results.storage_url, None).summary()


def names(results: ResultsFolder) -> list[str]:
    return [record.config.name for record in summary(results).records]


def check_finished(results: ResultsFolder, trials: int = TRIALS) -> None:
    study = summary(results)
    asked_for = [record for record in study.records if record.source is not Source.ABLATION]
    assert study.finished_trials == len(asked_for) == trials
    assert len(set(names(results))) == len(study.records)
    # The table that a person sees is the same study.
    assert results.summary_text.read_text().endswith(f"Total number of experiments: {len(study.records)}.")
    rows = results.trials_csv.read_text().splitlines()[1:]
    assert [row.split(",")[1] for row in rows] == names(results)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tune, Path], list[str]]:
    """The configurations of a study that nobody killed."""
    found: list[str] = []

    def run(tune: Tune, folder: Path) -> list[str]:
        if not found:
            assert tune("--trials", str(TRIALS), fresh="uninterrupted").returncode == 0
            found.extend(names(ResultsFolder(folder / "uninterrupted" / "autotuning_results")))
        return found

    return run


@pytest.mark.parametrize("point", LOSES_NOTHING)
def test_killed_between_trials_it_goes_on_as_if_nothing_had_happened(
    tune: Tune,
    results: ResultsFolder,
    tmp_path: Path,
    uninterrupted: Callable[[Tune, Path], list[str]],
    point: str,
) -> None:
    expected = uninterrupted(tune, tmp_path)
    killed = tune("--trials", str(TRIALS), kill=point)
    assert killed.returncode == -signal.SIGKILL
    again = tune("--trials", str(TRIALS))
    assert again.returncode == 0, again.stderr
    check_finished(results)
    assert names(results) == expected


@pytest.mark.parametrize("point", RUNS_AGAIN)
def test_killed_during_a_trial_it_runs_that_configuration_again(tune: Tune, results: ResultsFolder, point: str) -> None:
    assert tune("--trials", str(TRIALS), kill=point).returncode == -signal.SIGKILL
    before = names(results)
    storage = optuna.storages.RDBStorage(results.storage_url)
    study = optuna.load_study(study_name="ds-tune", storage=storage)
    [interrupted] = [trial for trial in study.trials if trial.state is optuna.trial.TrialState.RUNNING]
    name = "z{zero_stage}_gas{gradient_accumulation_steps}_tmbspg{micro_batch_size}".format(**interrupted.params)
    again = tune("--trials", str(TRIALS))
    assert again.returncode == 0, again.stderr
    assert f"{name} was interrupted and runs again." in again.stdout
    check_finished(results)
    assert names(results)[: len(before) + 1] == [*before, name]
    states = [trial.state for trial in study.get_trials()]
    assert states.count(optuna.trial.TrialState.FAIL) == 1
    assert states.count(optuna.trial.TrialState.COMPLETE) == len(names(results))


def test_killed_while_it_repairs_it_repairs_again(tune: Tune, results: ResultsFolder) -> None:
    """Between queueing the interrupted configuration and ending its old trial."""
    assert tune("--trials", str(TRIALS), kill="running:2").returncode == -signal.SIGKILL
    killed = tune("--trials", str(TRIALS), kill="interrupted trial queued, not failed:1")
    assert killed.returncode == -signal.SIGKILL
    assert tune("--trials", str(TRIALS)).returncode == 0
    check_finished(results)
    states = [trial.state for trial in StudyStore.load(results.storage_url, None).study.trials]
    assert states.count(optuna.trial.TrialState.FAIL) == 1


@pytest.mark.parametrize("source", ["baseline", "retry"])
def test_killed_while_a_queued_configuration_is_asked_for_it_still_runs(
    tune: Tune, results: ResultsFolder, source: str
) -> None:
    """Optuna stores one parameter after another; the queued trial is no longer waiting by then."""
    if source == "retry":
        assert tune("--trials", str(TRIALS), kill="running:2").returncode == -signal.SIGKILL
        [interrupted] = StudyStore.load(results.storage_url, None).study.trials[1:]
        wanted = "z{zero_stage}_gas{gradient_accumulation_steps}_tmbspg{micro_batch_size}".format(**interrupted.params)
    else:
        wanted = "z0_gas1_tmbspg1"
    killed = tune("--trials", str(TRIALS), kill="half of the parameters chosen:2")
    assert killed.returncode == -signal.SIGKILL
    assert tune("--trials", str(TRIALS)).returncode == 0
    check_finished(results)
    assert wanted in names(results)


def test_killed_again_and_again_it_comes_to_the_same_end(tune: Tune, results: ResultsFolder) -> None:
    for point in ("running:1", "ranks wrote their results, nothing saved:1", "constraint set:1"):
        assert tune("--trials", str(TRIALS), kill=point).returncode == -signal.SIGKILL
    assert tune("--trials", str(TRIALS)).returncode == 0
    check_finished(results)
    baseline = summary(results).baseline
    assert baseline is not None and baseline.config.name == "z0_gas1_tmbspg1"


def test_a_reason_to_end_is_not_forgotten(tune: Tune, results: ResultsFolder) -> None:
    killed = tune("--trials", "9", answer="nothing fits", kill="reason for the end stored:1")
    assert killed.returncode == -signal.SIGKILL
    again = tune("--trials", "9", answer="nothing fits")
    assert again.returncode == 3
    check_finished(results, trials=4)
