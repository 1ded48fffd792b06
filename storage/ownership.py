"""Whose results a folder holds, so that two studies never write over each other's files."""

import json
from pathlib import Path
from typing import Any

import sqlalchemy.engine

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.files import write_atomically
from ds_tune.storage.layout import ResultsFolder
from ds_tune.storage.urls import masked

_PLACE_PARAMETERS = ("host", "port", "service", "unix_socket", "options")
"""Parameters of a URL that say which database is meant, and not how it is reached."""


def storage_place(folder: ResultsFolder, storage_url: str) -> str:
    """Names a database as `study.json` does, the same for every way to write its URL and without secrets.

    One inside the results folder is named by its path there: the folder may be moved.
    """
    url = sqlalchemy.engine.make_url(storage_url)
    if url.get_backend_name() == "sqlite" and url.database:
        database, root = Path(url.database).resolve(), folder.root.resolve()
        return str(database.relative_to(root)) if database.is_relative_to(root) else f"sqlite:///{database}"
    query = {key: value for key, value in url.query.items() if key in _PLACE_PARAMETERS}
    place = sqlalchemy.engine.URL.create(
        url.get_backend_name(), host=url.host, port=url.port, database=url.database, query=query
    )
    return masked(place.render_as_string())


def check_owner(folder: ResultsFolder, study: str, storage_url: str, *, field: str = "results") -> None:
    """
    Args:
        field: name of what named the folder, for the message.

    Raises:
        UsageError: it holds another study's results.
    """
    if not folder.owner.exists():
        return
    try:
        document = json.loads(folder.owner.read_text())
        holds = str(document["study"])
        place = _recorded_place(folder, document)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(
            f"`{field}={folder.root}` has a study.json that is not ds-tune's; name another folder"
        ) from None
    if holds == study and place in (None, storage_place(folder, storage_url)):
        return
    where = "" if holds != study else f" in {place if '://' in str(place) else folder.root / str(place)}"
    suffix = study if holds != study else "2"
    raise UsageError(
        f"`{field}={folder.root}` holds the results of study {holds}{where}; "
        f"give this one a folder of its own, such as `{field}={folder.root}-{suffix}`"
    )


def claim(folder: ResultsFolder, study: str, storage_url: str) -> None:
    """Makes the results folder this study's.

    Raises:
        UsageError: it is another's.
    """
    check_owner(folder, study, storage_url)
    document = {"study": study, "storage": storage_place(folder, storage_url)}
    write_atomically(folder.owner, json.dumps(document) + "\n")


def _recorded_place(folder: ResultsFolder, document: dict[str, Any]) -> str | None:
    """Where the owner is stored; None if that is not known: study.json did not always say it."""
    place = document.get("storage")
    if place is None and folder.database.exists():
        return folder.database.name
    return None if place is None else str(place)
