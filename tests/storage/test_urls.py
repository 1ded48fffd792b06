"""Storage URLs: which are understood, and that no password is ever shown."""

from pathlib import Path

import pytest

from ds_tune.objectives.errors import UsageError
from ds_tune.storage.urls import check_storage_url, masked


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
    with pytest.raises(UsageError, match=r"`storage` is not a database URL; write sqlite:///FILE") as caught:
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
