"""A study holds measurements that can be compared, and one tuner at a time."""

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_tune.storage.layout import ResultsFolder
from ds_tune.storage.study_store import StudyStore

Tune = Callable[..., subprocess.CompletedProcess[str]]
SMALL = ["--gpus", "0", "--seq-len", "32", "--max-micro-batch", "2", "--max-global-batch", "8"]

OTHERS = {
    "another space": (["--max-micro-batch", "3"], "space dimensions micro_batch_size 1 to 2 there, 1 to 3 here"),
    "another largest batch": (["--max-global-batch", "12"], "space max_global_batch 8 there, 12 here"),
    "another model": (["--seq-len", "64"], "workload seq_len 32 there, 64 here"),
    "another number of ranks": (["--ranks", "1"], "hardware ranks 2 there, 1 here"),
    "another memory cap": (["--memory-cap", "512MiB"], "hardware memory_cap_bytes none there, 536870912 here"),
    "another base configuration": (
        ["--ds-config", "ds.json"],
        "workload base_ds_config gradient_clipping none there, 0.5 here",
    ),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> ResultsFolder:
    """The results folder that all refusals leave as it is."""
    return ResultsFolder(tmp_path_factory.mktemp("study") / "results")


@pytest.fixture
def measured(tune: Tune, results: ResultsFolder, tmp_path: Path) -> ResultsFolder:
    if not results.root.exists():
        assert tune("--trials", "1", "--results", str(results.root), space=SMALL).returncode == 0
    (tmp_path / "ds.json").write_text(json.dumps({"gradient_clipping": 0.5}))
    return results


@pytest.mark.parametrize("other", OTHERS)
def test_a_study_of_something_else_is_refused(tune: Tune, measured: ResultsFolder, other: str) -> None:
    options, difference = OTHERS[other]
    before = StudyStore.load(measured.storage_url, None).records()
    refused = tune(*SMALL, "--trials", "2", "--results", str(measured.root), space=options)
    assert refused.returncode == 2
    assert refused.stderr.startswith("ds-tune: study ds-tune measured something else (")
    assert difference in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert StudyStore.load(measured.storage_url, None).records() == before


def test_a_fixed_global_batch_is_another_space(tune: Tune, measured: ResultsFolder) -> None:
    space = ["--gpus", "0", "--seq-len", "32", "--max-micro-batch", "2", "--global-batch", "4"]
    refused = tune("--trials", "2", "--results", str(measured.root), space=space)
    assert refused.returncode == 2
    assert "space global_batch none there, 4 here" in refused.stderr


def test_a_study_that_learned_nothing_is_begun_anew(tune: Tune, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"gradient_clipping": 0.5}))
    assert tune("--trials", "1", "--ds-config", "ds.json", answer="invalid").returncode == 2
    assert tune("--trials", "1").returncode == 0
    records = StudyStore.load(ResultsFolder(tmp_path / "autotuning_results").storage_url, None).records()
    assert [record.number for record in records] == [0]


def test_a_results_folder_holds_one_study(tune: Tune, tmp_path: Path) -> None:
    assert tune("--trials", "1", "--study", "first").returncode == 0
    before = sorted(path.name for path in (tmp_path / "autotuning_results").iterdir())
    refused = tune("--trials", "1", "--study", "second")
    assert refused.returncode == 2
    assert refused.stderr == (
        "ds-tune: --results autotuning_results holds the results of study first; "
        "give this one a folder of its own, such as --results autotuning_results-second\n"
    )
    assert sorted(path.name for path in (tmp_path / "autotuning_results").iterdir()) == before


def test_studies_of_one_name_in_two_storages_do_not_share_a_folder(tune: Tune, tmp_path: Path) -> None:
    assert tune("--trials", "1", "--storage", "sqlite:///a.db").returncode == 0
    refused = tune("--trials", "1", "--storage", "sqlite:///b.db")
    assert refused.returncode == 2
    assert refused.stderr == (
        f"ds-tune: --results autotuning_results holds the results of study ds-tune in sqlite:///{tmp_path}/a.db; "
        "give this one a folder of its own, such as --results autotuning_results-2\n"
    )
    assert not (tmp_path / "b.db").exists()
    assert tune("--trials", "2", "--storage", f"sqlite:///{tmp_path}/a.db").returncode == 0


def test_a_study_is_not_exported_over_anothers_results(tune: Tune, command: Tune) -> None:
    for name in ("first", "second"):
        assert tune("--trials", "1", "--results", name).returncode == 0
    refused = command("export", "--results", "first", "--out", "second")
    assert refused.returncode == 2
    assert refused.stderr == (
        "ds-tune: --out second holds the results of study ds-tune in second/study.db; "
        "give this one a folder of its own, such as --out second-2\n"
    )
    assert command("export", "--results", "first", "--out", "first").returncode == 0


def test_two_studies_share_a_database_from_folders_of_their_own(tune: Tune, tmp_path: Path) -> None:
    for name in ("first", "second"):
        database = ["--storage", "sqlite:///both.db"]
        assert tune("--trials", "1", "--study", name, "--results", name, *database).returncode == 0
    url = f"sqlite:///{tmp_path}/both.db"
    assert all(len(StudyStore.load(url, name).records()) == 1 for name in ("first", "second"))


def test_a_second_tuner_is_refused_until_the_first_is_gone(
    tune: Tune, tuning: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    holder = tuning("--trials", "2")
    refused = tune("--trials", "2")
    assert refused.returncode == 2
    assert f"ds-tune: another tuner (process {holder.pid}) is working on study ds-tune; wait for it" in refused.stderr
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert tune("--trials", "1").returncode == 0
