"""The database of a study: opened for what it is to be, its errors in sentences."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
import sqlalchemy.engine
import sqlalchemy.exc

from objectives.errors import EnvironmentFault, UsageError
from storage.urls import check_storage_url, masked

FAULTS = (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError)
"""What a database that was opened raises when it fails."""

OPTUNA_TABLES = {"studies", "study_user_attributes", "trials", "trial_params", "version_info"}
"""Some of those that Optuna makes, by which a database of its is known."""

LOCK_SECONDS = 60
"""How long to wait while another process writes to a SQLite file."""

_DRIVER_PACKAGES = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
"""What pip calls a driver, where it is not the name of its module."""


def open_storage(storage_url: str, *, to_read: bool = False) -> optuna.storages.RDBStorage:
    """
    Args:
        to_read: a database that Optuna has not made is refused, and left as it is; otherwise its tables are made.

    Raises:
        UsageError: the URL is of no use; or no such database answers, or its driver is not installed.
        EnvironmentFault: another process keeps it locked.
    """
    check_storage_url(storage_url)
    is_sqlite = sqlalchemy.engine.make_url(storage_url).get_backend_name() == "sqlite"
    options = {"connect_args": {"timeout": LOCK_SECONDS}} if is_sqlite else {}
    try:
        if to_read:
            _check_tables(storage_url, options)
        return optuna.storages.RDBStorage(storage_url, engine_kwargs=options)
    except ImportError as error:
        # Optuna raises one of its own; the one that names the module is its cause.
        module = error.name or getattr(error.__cause__, "name", None) or "the database's driver"
        package = _DRIVER_PACKAGES.get(module, module)
        raise UsageError(f"--storage {masked(storage_url)} needs a driver: pip install {package}") from error
    except (sqlalchemy.exc.SQLAlchemyError, RuntimeError) as error:
        said = _said(error)
        if "database is locked" in said:
            raise EnvironmentFault(
                f"the storage {masked(storage_url)} is locked by another process; once that has ended, the same "
                "command goes on"
            ) from error
        raise UsageError(f"--storage {masked(storage_url)} cannot be opened: {said}") from error


def _check_tables(storage_url: str, options: Mapping[str, Any]) -> None:
    """
    Raises:
        UsageError: no tables of Optuna's are there. To open the database would make them.
    """
    url = sqlalchemy.engine.make_url(storage_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        raise UsageError(f"--storage {masked(storage_url)}: there is no such file")
    engine = sqlalchemy.create_engine(url, **options)
    try:
        found = set(sqlalchemy.inspect(engine).get_table_names())
    finally:
        engine.dispose()
    if not found >= OPTUNA_TABLES:
        raise UsageError(f"--storage {masked(storage_url)} holds no studies; name the database of one")


def storage_fault(error: BaseException, storage_url: str) -> EnvironmentFault:
    """The sentence for a storage that failed after it had been opened."""
    return EnvironmentFault(
        f"the storage {masked(storage_url)} failed: {_said(error)}; once it works again, the same command goes on"
    )


def _said(error: BaseException) -> str:
    """The database's own words, which Optuna and SQLAlchemy wrap."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    driver = next((orig for each in causes if (orig := getattr(each, "orig", None)) is not None), error)
    return (str(driver).splitlines() or [type(driver).__name__])[0]
