"""What goes wrong with databases and files is told in one sentence, whichever command it happens to."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_tune.tuner.cli import main

Tune = Callable[..., subprocess.CompletedProcess[str]]
Said = pytest.CaptureFixture[str]

TRIALS = ["--trials", "1"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("words", [["report"], ["export", "--out", "copy"], ["dashboard"]], ids=lambda words: words[0])
def test_reading_makes_no_tables_in_another_programs_database(here: Path, capsys: Said, words: list[str]) -> None:
    with sqlite3.connect("songs.db") as connection:
        connection.execute("create table songs(title)")
    connection.close()
    before = (here / "songs.db").read_bytes()
    assert main([*words, "--storage", "sqlite:///songs.db"]) == 2
    assert capsys.readouterr().err == (
        "ds-tune: --storage sqlite:///songs.db has no tables of Optuna's, so no study; name the database of one\n"
    )
    assert (here / "songs.db").read_bytes() == before


def test_a_storage_that_fails_is_the_same_sentence_for_every_command(tune: Tune, here: Path, capsys: Said) -> None:
    assert tune(*TRIALS, "--storage", "sqlite:///s.db").returncode == 0
    with sqlite3.connect("s.db") as connection:
        connection.execute("alter table trials rename column state to status")
    connection.close()
    sentence = (
        "ds-tune: the storage sqlite:///s.db failed: no such column: trials.state; "
        "when that is put right, repeat the command\n"
    )
    for words in (["report"], ["export", "--out", "copy"]):
        assert main([*words, "--storage", "sqlite:///s.db"]) == 1
        assert capsys.readouterr().err == sentence
    failed = tune(*TRIALS, "--storage", "sqlite:///s.db")
    assert (failed.returncode, failed.stderr) == (1, sentence)


@pytest.mark.parametrize("file", ["/proc/x.db", "/sys/x.db"])
def test_a_place_where_no_database_can_be_is_said_and_the_folder_stays_free(tune: Tune, here: Path, file: str) -> None:
    refused = tune(*TRIALS, "--storage", f"sqlite:///{file}")
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"ds-tune: --storage sqlite:///{file}: the folder {Path(file).parent} cannot be ")
    assert refused.stderr.count("\n") == 1
    assert tune(*TRIALS, "--storage", "sqlite:///s.db").returncode == 0


@pytest.mark.parametrize("name", ["study.json", "summary.json", "study.db", "cmd_optimal.txt"])
def test_a_folder_where_a_file_is_to_be_written_is_said_before_the_search(tune: Tune, here: Path, name: str) -> None:
    (here / "results" / name).mkdir(parents=True)
    refused = tune(*TRIALS, "--results", "results")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == (
        f"ds-tune: --results results cannot be used: results/{name} is a folder; move it away or name another folder\n"
    )


@pytest.mark.parametrize("name", ["z0_gas1_tmbspg1", "z1_ac1_compile-blocks_gas8_tmbspg16"])
def test_a_file_where_a_trials_folder_is_to_be_is_said_before_the_search(tune: Tune, here: Path, name: str) -> None:
    (here / "results").mkdir()
    (here / "results" / name).touch()
    refused = tune(*TRIALS, "--results", "results")
    assert refused.returncode == 2
    assert refused.stderr == (
        f"ds-tune: --results results cannot be used: results/{name} is no folder; move it away or name another folder\n"
    )


def test_export_blocked_by_a_directory_fails_in_one_sentence_with_file_and_reason(
    tune: Tune, here: Path, capsys: Said
) -> None:
    assert tune(*TRIALS).returncode == 0
    (here / "copy" / "z0_gas1_tmbspg1" / "metrics.json").mkdir(parents=True)
    assert main(["export", "--out", "copy"]) == 1
    assert capsys.readouterr().err == (
        "ds-tune: copy/z0_gas1_tmbspg1/metrics.json cannot be used (Is a directory); "
        "put that right and repeat the command\n"
    )
    assert not list(here.glob("copy/z0_gas1_tmbspg1/.*"))


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["report"], ["report", "--json", "--quiet"], ["export", "--out", "copy"]])
def test_output_that_cannot_be_written_is_said_once(tune: Tune, here: Path, words: list[str], unbuffered: str) -> None:
    assert tune(*TRIALS).returncode == 0
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "ds_tune.tuner", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    sentence = "ds-tune: the output cannot be written (No space left on device); direct it elsewhere\n"
    assert (done.returncode, done.stderr) == (1, sentence)
