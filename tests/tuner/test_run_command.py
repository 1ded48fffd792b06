"""`tune run` trains with the winner of a study that really measured, and says why it does not."""

from pathlib import Path

import pytest

from ds_tune.tuner.cli import main

RECORDING = Path(__file__).parents[2] / "benchmarks" / "data" / "2xH100.gpt2-xl.jsonl"


def test_figures_of_a_recording_are_no_reason_to_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results"
    assert main(["--replay", str(RECORDING), "--trials", "2", "--results", str(results), "--quiet"]) == 0
    assert main(["run", "--results", str(results)]) == 2
    assert capsys.readouterr().err == (f"ds-tune: the winner in {results} is of replayed figures: nothing was run\n")


def test_a_folder_without_a_study_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"ds-tune: there is no study in {tmp_path}")
