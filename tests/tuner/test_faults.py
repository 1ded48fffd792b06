"""What goes wrong with databases and files is told in one sentence, whichever command it happens to."""

import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tuner.cli import main

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
