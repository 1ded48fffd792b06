"""Opening the database of a study, and what is said when it cannot be had or fails."""

import contextlib
import re
import sqlite3
from collections.abc import Iterator
from typing import Any

import optuna
import sqlalchemy
import sqlalchemy.exc

from ds_tune.objectives.errors import DsTuneError, EnvironmentFault, UsageError
from ds_tune.storage.urls import check_storage_url, masked

STORAGE_ERRORS = (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError)
"""Exceptions that come out of Optuna when its database fails."""

LOCKED_SECONDS = 60
"""Seconds to wait for a SQLite database that somebody else is writing to."""

OPTUNA_COLUMNS = {
    "studies": {"study_id", "study_name"},
    "trials": {"trial_id", "study_id"},
    "version_info": {"schema_version"},
    "alembic_version": {"version_num"},
}
"""Some of Optuna's tables, with columns that they have had in all its versions."""

_OPTUNA_VERSION = re.compile(r"v\d+\.\d+")
"""How the versions of Optuna's tables begin, such as v3.2.0.a; other programs' are hashes."""

_DRIVER_PACKAGES = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
"""Name of a driver for pip, where it is not the name of its module."""

_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_UNUSABLE = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY}
"""SQLite's codes for a file that the user should not have named; the others are the machine's faults."""


def open_storage(storage_url: str, *, reading: bool = False) -> optuna.storages.RDBStorage:
    """
    Args:
        reading: nothing is made in a database that Optuna does not use yet.

    Raises:
        UsageError: the URL is of no use; or no such database answers, or its driver is not installed; or its tables are
            not Optuna's.
        EnvironmentFault: somebody else keeps the database locked.
    """
    check_storage_url(storage_url)
    is_sqlite = sqlalchemy.make_url(storage_url).get_backend_name() == "sqlite"
    options: dict[str, Any] = {"connect_args": {"timeout": LOCKED_SECONDS}} if is_sqlite else {}
    try:
        _check_tables(storage_url, options, reading=reading)
        return optuna.storages.RDBStorage(storage_url, engine_kwargs=options, skip_table_creation=reading)
    except ImportError as error:
        # Optuna raises one of its own; the one that names the module is its cause.
        module = error.name or getattr(error.__cause__, "name", None) or "the database's driver"
        package = _DRIVER_PACKAGES.get(module, module)
        raise UsageError(f"`storage={masked(storage_url)}` needs a driver: pip install {package}") from error
    except (*STORAGE_ERRORS, RuntimeError) as error:
        if _sqlite_code(error) in _BUSY:
            raise storage_fault(error, storage_url) from error
        raise UsageError(f"`storage={masked(storage_url)}` cannot be opened: {_said(error)}") from error


def _check_tables(storage_url: str, options: dict[str, Any], *, reading: bool) -> None:
    """
    Raises:
        UsageError: there are tables of another program under Optuna's names, or in a file of its own; or, for reading,
            not all of Optuna's.
    """
    engine = sqlalchemy.create_engine(storage_url, **options)
    try:
        inspector = sqlalchemy.inspect(engine)
        there = [table for table in OPTUNA_COLUMNS if inspector.has_table(table)]
        for table in there:
            if not OPTUNA_COLUMNS[table] <= {column["name"] for column in inspector.get_columns(table)}:
                raise UsageError(
                    f"`storage={masked(storage_url)}` has a table {table} that is not Optuna's; name another database"
                )
        if (other := _table_of_another_program(engine, inspector)) is not None and not reading:
            raise UsageError(
                f"`storage={masked(storage_url)}` is another program's database (it has a table {other}); "
                "name another one"
            )
    finally:
        engine.dispose()
    if reading and len(there) < len(OPTUNA_COLUMNS):
        raise UsageError(
            f"`storage={masked(storage_url)}` has no tables of Optuna's, so no study; name the database of one"
        )


def _table_of_another_program(engine: sqlalchemy.Engine, inspector: sqlalchemy.Inspector) -> str | None:
    """A table because of which Optuna must make none here; None where it may.

    A server's database may be shared, but not its `alembic_version`, in which programs such as MLflow keep the version
    of their own tables. A file is one program's.
    """
    tables = inspector.get_table_names()
    if "alembic_version" in tables:
        with engine.connect() as connection:
            versions = connection.execute(sqlalchemy.text("select version_num from alembic_version")).scalars().all()
        if not all(_OPTUNA_VERSION.match(str(version)) for version in versions):
            return "alembic_version"
    if engine.dialect.name != "sqlite" or set(OPTUNA_COLUMNS) <= set(tables):
        return None
    from optuna.storages._rdb import models  # as late as Optuna does it

    optunas = {"alembic_version", *models.BaseModel.metadata.tables}
    return next((table for table in tables if table not in optunas), None)


@contextlib.contextmanager
def storage_faults(storage_url: str) -> Iterator[None]:
    """Turns what a failing database raises into one sentence.

    Raises:
        UsageError, EnvironmentFault: see `storage_fault`.
    """
    try:
        yield
    except STORAGE_ERRORS as error:
        raise storage_fault(error, storage_url) from error


def storage_fault(error: BaseException, storage_url: str) -> DsTuneError:
    """The sentence for a database that failed after it was opened: whose fault it is, and what its driver said."""
    code = _sqlite_code(error)
    if code in _BUSY:
        return EnvironmentFault(
            f"the storage {masked(storage_url)} is kept locked by another program ({_said(error)}); "
            "when that has let it go, repeat the command"
        )
    if code in _UNUSABLE:
        return UsageError(f"`storage={masked(storage_url)}` cannot be used: {_said(error)}; name another database")
    return EnvironmentFault(
        f"the storage {masked(storage_url)} failed: {_said(error)}; when that is put right, repeat the command"
    )


def _root_cause(error: BaseException) -> BaseException:
    """Returns what the driver raised: Optuna wraps SQLAlchemy's error, which wraps the driver's."""
    if isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    return getattr(error, "orig", None) or error


def _said(error: BaseException) -> str:
    cause = _root_cause(error)
    return (str(cause).splitlines() or [type(cause).__name__])[0]


def _sqlite_code(error: BaseException) -> int | None:
    """SQLite's primary result code, which is the lowest byte of its extended ones."""
    code = getattr(_root_cause(error), "sqlite_errorcode", None)
    return None if code is None else code & 0xFF
