"""Storage URLs: which are understood, and how they are printed."""

from pathlib import Path

import sqlalchemy.engine
import sqlalchemy.exc

from ds_tune.objectives.errors import UsageError

_SECRET_PARAMETERS = ("password", "passwd", "sslpassword", "token")
BACKENDS = ("sqlite", "postgresql", "mysql")


def masked(storage_url: str) -> str:
    """The URL as it may be shown: with `***` for its password, wherever it stands."""
    try:
        url = sqlalchemy.engine.make_url(storage_url)
    except (sqlalchemy.exc.ArgumentError, ValueError):  # ValueError: a port that is no number
        return "(unreadable URL)"
    secret = {key: "***" for key in url.query if key.lower() in _SECRET_PARAMETERS}
    return url.update_query_dict(secret).render_as_string(hide_password=True).replace("%2A%2A%2A", "***")


def check_storage_url(storage_url: str) -> None:
    """
    Raises:
        UsageError: it is no database URL, or of a kind that keeps nothing or is not supported.
    """
    try:
        url = sqlalchemy.engine.make_url(storage_url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise UsageError(
            "`storage` is not a database URL; write sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE"
        ) from None
    if url.get_backend_name() not in BACKENDS:
        raise UsageError(f"`storage={masked(storage_url)}`: the database must be one of {', '.join(BACKENDS)}")
    if url.get_backend_name() == "sqlite":
        if not url.database or url.database == ":memory:":
            raise UsageError("`storage` must name a file: a SQLite database in memory would be lost with the tuner")
        folder = Path(url.database).resolve().parent
        if not folder.is_dir():
            raise UsageError(f"`storage={masked(storage_url)}`: there is no folder {folder}")
