"""Opening databases: what cannot be opened is said, what is only read is not changed, and what fails says why."""

import importlib.util
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import sqlalchemy.exc

from ds_tune.objectives.errors import EnvironmentFault, UsageError
from ds_tune.storage import database
from ds_tune.storage.database import open_storage, storage_fault, storage_faults
from ds_tune.storage.study_store import StudyStore

SECRETS = ("hunter2", "swordfish")
POSTGRESQL = "postgresql://me:hunter2@host/db"


def make_sqlite(path: Path, *statements: str) -> str:
    """A database of another program; returns its URL."""
    with sqlite3.connect(path) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()
    return f"sqlite:///{path}"


@pytest.fixture
def optunas(tmp_path: Path) -> str:
    """The URL of a database in which Optuna keeps a study."""
    url = f"sqlite:///{tmp_path}/optuna.db"
    optuna.create_study(study_name="study", storage=open_storage(url))
    return url


@pytest.fixture
def locked(optunas: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same, while another program writes to it."""
    monkeypatch.setattr(database, "LOCKED_SECONDS", 0.1)
    connection = sqlite3.connect(optunas.removeprefix("sqlite:///"))
    connection.execute("begin exclusive")
    yield optunas
    connection.close()


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
    with pytest.raises(UsageError, match=r"postgresql\+nonsense://me:\*\*\*@host/db` cannot be opened") as caught:
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


@pytest.mark.parametrize("statements", [[], ["create table songs(title)"], ["create table trials(trial_id, study_id)"]])
def test_reading_leaves_another_programs_database_as_it_is(tmp_path: Path, statements: list[str]) -> None:
    url = make_sqlite(tmp_path / "other.db", *statements)
    before = (tmp_path / "other.db").read_bytes()
    with pytest.raises(UsageError) as caught:
        StudyStore.load(url, None)
    assert str(caught.value) == (
        f"`storage=sqlite:///{tmp_path}/other.db` has no tables of Optuna's, so no study; name the database of one"
    )
    assert (tmp_path / "other.db").read_bytes() == before


def test_reading_leaves_optunas_database_as_it_is(optunas: str) -> None:
    path = Path(optunas.removeprefix("sqlite:///"))
    before = path.read_bytes()
    assert optuna.get_all_study_names(open_storage(optunas, reading=True)) == ["study"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("reading", [False, True])
def test_tables_that_only_have_the_names_of_optunas_are_refused_and_left_alone(tmp_path: Path, reading: bool) -> None:
    url = make_sqlite(tmp_path / "other.db", "create table studies(a)", "create table trials(a)")
    before = (tmp_path / "other.db").read_bytes()
    with pytest.raises(UsageError, match=r"has a table studies that is not Optuna's; name another database$"):
        open_storage(url, reading=reading)
    assert (tmp_path / "other.db").read_bytes() == before


@pytest.mark.parametrize("reading", [False, True])
def test_a_locked_database_is_nobodys_mistake(locked: str, reading: bool) -> None:
    with pytest.raises(EnvironmentFault) as caught:
        open_storage(locked, reading=reading)
    assert str(caught.value) == (
        f"the storage {locked} is kept locked by another program (database is locked); "
        "when that has let it go, repeat the command"
    )


def test_storage_error_becomes_an_environment_fault_with_the_driver_s_message(optunas: str) -> None:
    storage = open_storage(optunas)
    with sqlite3.connect(optunas.removeprefix("sqlite:///")) as connection:
        connection.execute("drop table studies")
    connection.close()
    with pytest.raises(EnvironmentFault) as caught, storage_faults(optunas):
        optuna.get_all_study_names(storage)
    assert str(caught.value) == (
        f"the storage {optunas} failed: no such table: studies; when that is put right, repeat the command"
    )


def test_a_database_that_may_only_be_read_is_the_users_to_change(optunas: str) -> None:
    connection = sqlite3.connect(f"file:{optunas.removeprefix('sqlite:///')}?mode=ro", uri=True)
    with pytest.raises(sqlite3.OperationalError) as refused:
        connection.execute("delete from studies")
    connection.close()
    fault = storage_fault(sqlalchemy.exc.OperationalError("DELETE", {}, refused.value), optunas)
    assert isinstance(fault, UsageError)
    assert str(fault) == (
        f"`storage={optunas}` cannot be used: attempt to write a readonly database; name another database"
    )


def test_a_server_that_stops_answering_is_named_without_its_password() -> None:
    lost = sqlalchemy.exc.OperationalError("SELECT 1", {}, ConnectionError("server closed the connection\nmore of it"))
    fault = storage_fault(lost, POSTGRESQL)
    assert isinstance(fault, EnvironmentFault)
    assert str(fault) == (
        "the storage postgresql://me:***@host/db failed: server closed the connection; "
        "when that is put right, repeat the command"
    )


def test_an_error_without_words_is_named() -> None:
    assert "failed: TimeoutError; " in str(storage_fault(sqlalchemy.exc.DBAPIError("", {}, TimeoutError()), POSTGRESQL))


MLFLOW = ("create table alembic_version(version_num)", "insert into alembic_version values('acf3f17fdcc7')")


@pytest.mark.parametrize(
    "statements",
    [
        [*MLFLOW, "create table experiments(name)"],
        MLFLOW,
        ["create table songs(title)"],
        ["create table songs(title)", "create table studies(study_id, study_name)"],
    ],
    ids=["MLflow", "a version of no Optuna", "songs", "songs beside studies"],
)
def test_the_database_of_another_program_is_refused_before_anything_is_made(
    tmp_path: Path, statements: list[str]
) -> None:
    url = make_sqlite(tmp_path / "other.db", *statements)
    before = (tmp_path / "other.db").read_bytes()
    with pytest.raises(UsageError, match=r"is another program's database \(it has a table \w+\); name another one$"):
        open_storage(url)
    assert (tmp_path / "other.db").read_bytes() == before


def test_a_table_beside_optunas_own_is_left_alone(optunas: str) -> None:
    make_sqlite(Path(optunas.removeprefix("sqlite:///")), "create table notes(text)")
    assert optuna.get_all_study_names(open_storage(optunas)) == ["study"]
