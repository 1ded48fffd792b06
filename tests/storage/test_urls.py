"""Storage URLs: which are understood, and that no password is ever shown."""

import importlib.util
import os
import re
from pathlib import Path

import pytest

from objectives.errors import UsageError
from storage.study_store import StudyStore, open_storage, storage_fault
from storage.urls import check_storage_url, masked

SECRETS = ("hunter2", "swordfish")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:///study.db", "sqlite:///study.db"),
        ("postgresql://me:hunter2@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me@host:5432/db", "postgresql://me@host:5432/db"),
        ("mysql+pymysql://me:hunter2@host/db?charset=utf8", "mysql+pymysql://me:***@host/db?charset=utf8"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert masked(url) == shown


@pytest.mark.parametrize("parameter", ["password", "PASSWORD", "passwd", "sslpassword", "token"])
def test_a_password_among_the_parameters_is_not_shown_either(parameter: str) -> None:
    shown = masked(f"postgresql://me@host/db?{parameter}=hunter2&sslmode=require")
    assert set(shown.removeprefix("postgresql://me@host/db?").split("&")) == {f"{parameter}=***", "sslmode=require"}


@pytest.mark.parametrize(
    "url",
    [
        "hunter2",
        "postgresql//me:hunter2@host/db",
        "postgresql://me:hunter2@host:not-a-port/db",
        "",
    ],
)
def test_a_broken_url_is_said_to_be_none_and_not_repeated(url: str) -> None:
    with pytest.raises(UsageError, match=r"--storage is not a database URL; write sqlite:///FILE") as caught:
        check_storage_url(url)
    assert "hunter2" not in str(caught.value)
    assert masked(url) == "(unreadable URL)"


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_in_memory_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="a SQLite database in memory would be lost with the tuner"):
        check_storage_url(url)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"there is no folder {tmp_path}/missing$"):
        check_storage_url(f"sqlite:///{tmp_path}/missing/study.db")


def test_other_databases_are_refused() -> None:
    with pytest.raises(UsageError, match="must be one of sqlite, postgresql, mysql") as caught:
        check_storage_url("oracle://me:hunter2@host/db")
    assert "oracle://me:***@host/db" in str(caught.value)


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


def test_a_storage_that_stops_answering_is_named_without_its_password() -> None:
    fault = storage_fault(ConnectionError("server closed the connection"), "postgresql://me:hunter2@host/db")
    assert str(fault) == (
        "the storage postgresql://me:***@host/db stopped answering: server closed the connection; "
        "the same command goes on"
    )
