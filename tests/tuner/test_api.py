"""`ds_tune.tuner.tune`: a study from a Python program."""

import json
import re
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from ds_tune.objectives.errors import EnvironmentFault, UsageError
from ds_tune.objectives.loss_scale import STAGE_0_LEFT_OUT
from ds_tune.storage.records import StudyState
from ds_tune.storage.study_store import StudyStore
from ds_tune.tuner import tune
from ds_tune.tuner.observer import SilentObserver

CHECKOUT = Path(__file__).parents[2]

SIMULATED = {"simulate": True, "hardware": "2xH100", "trials": 3}


@pytest.mark.slow
def test_readme_s_example_trains_prints_its_lines_and_writes_its_results(tmp_path: Path) -> None:
    """It has no `if __name__ == "__main__"`: the ranks do not import the script."""
    [example] = re.findall(r"```python\n(.+?)```", (CHECKOUT / "README.md").read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 6
    shorter = example.replace("trials=9", "trials=2, seq_len=32, verify=False")
    assert shorter != example
    done = subprocess.run([sys.executable, "-P", "-c", shorter], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads((tmp_path / "autotuning_results" / "summary.json").read_text())
    assert (document["state"], len(document["trials"])) == ("finished", 2)
    assert done.stdout.startswith(f"{document['best']['name']} Speedup(factor=")
    assert str(document["best"]["config"]) in done.stdout
    assert (tmp_path / "autotuning_results" / "ds_config_optimal.json").exists()


def test_a_call_returns_the_stored_study_s_summary_and_the_same_call_again_adds_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    verbosity = optuna.logging.get_verbosity()
    first = tune(**SIMULATED, results=tmp_path)
    again = tune(**SIMULATED, results=str(tmp_path))
    assert first.state is StudyState.FINISHED
    assert [record.number for record in again.records] == [0, 1, 2]
    assert again.records == first.records
    assert StudyStore.load(f"sqlite:///{tmp_path}/study.db", None).records() == first.records
    assert capfd.readouterr() == ("", "")
    assert optuna.logging.get_verbosity() == verbosity


def test_more_is_added_by_each_finished_call(tmp_path: Path) -> None:
    tune(**SIMULATED, results=tmp_path)
    more = {name: value for name, value in SIMULATED.items() if name != "trials"} | {"more": 2}
    assert [tune(**more, results=tmp_path).finished_trials for _ in range(2)] == [5, 7]


def test_verbose_shows_what_the_command_line_shows(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tune(**SIMULATED, results=tmp_path, verbose=True)
    output, error = capfd.readouterr()
    assert error == ""
    assert output.startswith("Simulated: a cost model of 2xH100 answers")
    assert "Best by ZeRO stage" in output
    assert f"Browse the trials:  ds-tune dashboard --results {tmp_path}" in output


def test_an_observer_is_told_and_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told = []

    class Observer(SilentObserver):
        def say(self, text: str) -> None:
            told.append(text)

        def trial_finished(self, record, summary) -> None:  # type: ignore[no-untyped-def]
            told.append(record.number)

    tune(**SIMULATED, results=tmp_path, observer=Observer())
    simulated = "Simulated: a cost model of 2xH100 answers, with errors and noise; nothing is run."
    assert told == [simulated, STAGE_0_LEFT_OUT, 0, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_impossible_arguments_of_tune_raise_with_the_argument_s_name_and_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^`seq_len` must be at least 2 \(got 1\)$"):
        tune(seq_len=1, gpus=0, results=tmp_path / "out")
    with pytest.raises(UsageError, match=r"^`trials` must be at least 1 \(got 0\)$"):
        tune(trials=0, results=tmp_path / "out")
    with pytest.raises(UsageError, match=r"^there is no field `trails`; is `trials` meant"):
        tune(trails=3, results=tmp_path / "out")
    with pytest.raises(UsageError, match=r"^`observer` lacks say, study_opened, .* derived from `SilentObserver`$"):
        tune(observer=object(), results=tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^`observer` is a class; give it an object "):
        tune(observer=SilentObserver, results=tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^`verbose` must be True or False \(got 'yes'\)$"):
        tune(verbose="yes", results=tmp_path / "out")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_what_is_asked_for_is_a_fault_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho broken >&2\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentFault, match="`gpus=0` runs on the CPU"):
        tune(results=tmp_path / "out")


def test_an_interrupted_call_leaves_a_study_that_goes_on(tmp_path: Path) -> None:
    class Interrupted(SilentObserver):
        def trial_started(self, number, config, summary) -> None:  # type: ignore[no-untyped-def]
            if number == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(**SIMULATED, results=tmp_path, observer=Interrupted())
    assert tune(**SIMULATED, results=tmp_path).finished_trials == 3


def test_importing_the_package_loads_nothing_that_takes_long() -> None:
    script = "import sys, ds_tune.tuner; print(*{'optuna', 'numpy', 'rich', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
