"""Whose results a folder holds, so that no two studies write over each other's files."""

import json
from pathlib import Path

import sqlalchemy.engine

from objectives.errors import UsageError
from objectives.files import write_atomically
from storage.layout import ResultsFolder
from storage.urls import masked

IN_THE_FOLDER = "study.db"
"""A study's own database goes where its folder goes."""


def claim(folder: ResultsFolder, study: str, storage_url: str) -> None:
    """Makes the folder this study's.

    Raises:
        UsageError: it holds another study's results.
    """
    if check(folder, study, storage_url):
        return
    owner = {"study": study, "storage": _place(folder, storage_url)}
    write_atomically(folder.owner, json.dumps(owner) + "\n")


def check(folder: ResultsFolder, study: str, storage_url: str, *, option: str = "--results") -> bool:
    """Whether the folder is this study's; False for nobody's.

    Args:
        option: what names the folder on the command line.

    Raises:
        UsageError: it is another's.
    """
    if not folder.owner.exists():
        return False
    try:
        owner = json.loads(folder.owner.read_text())
        holds = owner["study"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"{option} {folder.root} has a study.json that is not ds-tune's; name another folder"
        ) from None
    # Those of earlier versions do not say where their study is.
    where = owner.get("storage", _place(folder, storage_url))
    if holds == study and where == _place(folder, storage_url):
        return True
    kept = folder.database if where == IN_THE_FOLDER else where
    whose = f"study {holds}" if holds != study else f"another study {holds}, which is kept in {kept}"
    raise UsageError(
        f"{option} {folder.root} holds the results of {whose}; give this one a folder of its own, such as "
        f"{option} {folder.root}-{study if holds != study else 2}"
    )


def _place(folder: ResultsFolder, storage_url: str) -> str:
    """A study's storage as it is written down: without its password, a file by its absolute path."""
    url = sqlalchemy.engine.make_url(storage_url)
    if url.get_backend_name() != "sqlite" or not url.database:
        return masked(storage_url)
    database = Path(url.database).resolve()
    return IN_THE_FOLDER if database == folder.database.resolve() else str(database)
