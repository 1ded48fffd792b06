"""Databases: opened, read without a trace, and their errors in sentences that show no password."""

import contextlib
import importlib.util
import os
import re
import sqlite3
from pathlib import Path

import optuna
import pytest

from objectives.errors import EnvironmentFault, UsageError
from storage.database import FAULTS, open_storage, storage_fault
from storage.study_store import StudyStore

SECRETS = ("hunter2", "swordfish")


@pytest.mark.parametrize(
    ("url", "module", "package"),
    [
        ("postgresql+psycopg://me:hunter2@host/db", "psycopg", "psycopg[binary]"),
        ("postgresql+psycopg2://me:hunter2@host/db", "psycopg2", "psycopg2-binary"),
        ("mysql://me:hunter2@host/db?passwd=swordfish", "MySQLdb", "mysqlclient"),
        ("mysql+pymysql://me:hunter2@host/db?passwd=swordfish", "pymysql", "pymysql"),
    ],
)
def test_a_missing_driver_is_named_as_pip_knows_it(url: str, module: str, package: str) -> None:
    if importlib.util.find_spec(module) is not None:
        pytest.skip(f"{module} is installed here")
    with pytest.raises(UsageError, match=f"needs a driver: pip install {re.escape(package)}$") as caught:
        open_storage(url)
    assert not any(secret in str(caught.value) for secret in SECRETS)


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_an_unreachable_server_is_said_in_one_sentence(driver: str) -> None:
    pytest.importorskip(driver)
    url = f"postgresql+{driver}://me:hunter2@127.0.0.1:1/db?sslpassword=swordfish"
    with pytest.raises(UsageError, match="cannot be opened: ") as caught:
        open_storage(url)
    assert "\n" not in str(caught.value)
    assert not any(secret in str(caught.value) for secret in SECRETS)


def test_an_unknown_driver_is_said() -> None:
    with pytest.raises(UsageError, match=r"postgresql\+nonsense://me:\*\*\*@host/db cannot be opened") as caught:
        open_storage("postgresql+nonsense://me:hunter2@host/db")
    assert "hunter2" not in str(caught.value)


def test_a_file_that_is_no_database_is_said_to_be_none_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("not a database, but somebody's notes\n" * 100)
    with pytest.raises(UsageError, match="cannot be opened: file is not a database"):
        open_storage(f"sqlite:///{file}")
    assert file.read_text().startswith("not a database")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_database_that_may_not_be_written_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="cannot be opened: unable to open database file"):
        open_storage(f"sqlite:///{tmp_path}/study.db")


def test_reading_a_study_makes_no_database(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        StudyStore.load(f"sqlite:///{tmp_path}/mistyped.db", None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tables", [[], ["bookmarks"], ["studies", "trials"]])
def test_reading_leaves_a_foreign_database_as_it_is(tmp_path: Path, tables: list[str]) -> None:
    file = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(file)) as connection:
        for table in tables:
            connection.execute(f"create table {table}(a)")
        connection.commit()
    before = file.read_bytes()
    with pytest.raises(UsageError, match="holds no studies; name the database of one"):
        StudyStore.load(f"sqlite:///{file}", None)
    assert file.read_bytes() == before


def test_a_storage_that_fails_is_named_without_its_password() -> None:
    fault = storage_fault(ConnectionError("server closed the connection"), "postgresql://me:hunter2@host/db")
    assert str(fault) == (
        "the storage postgresql://me:***@host/db failed: server closed the connection; "
        "once it works again, the same command goes on"
    )


def test_a_fault_is_said_in_the_database_s_own_words(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    storage = open_storage(url)
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db")) as connection:
        connection.execute("drop table study_directions")
    with pytest.raises(FAULTS) as caught:
        optuna.create_study(storage=storage)
    assert "failed: no such table: study_directions; once it works again" in str(storage_fault(caught.value, url))


def test_a_database_that_another_process_locks_is_no_mistake_of_the_user_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.database.LOCK_SECONDS", 0.1)
    url = f"sqlite:///{tmp_path}/study.db"
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db")) as connection:
        connection.execute("begin exclusive")
        with pytest.raises(EnvironmentFault, match="is locked by another process; once that has ended"):
            open_storage(url)
