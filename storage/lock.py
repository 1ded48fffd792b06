"""One tuner a study: an exclusive lock that the kernel releases however its holder ends."""

import fcntl
import hashlib
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import sqlalchemy.engine

from ds_tune.objectives.errors import DsTuneError, EnvironmentFault, UsageError
from ds_tune.storage.urls import masked


class StudyLock:
    """Holds the lock of one study from `__enter__` to `__exit__` or the end of the process.

    Two tuners that share a server's database from different machines are not kept apart: the lock is a file on
    this machine.
    """

    def __init__(self, storage_url: str, study: str) -> None:
        self._study = study
        self._storage_url = storage_url
        self._path = lock_file(storage_url, study)
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        """
        Raises:
            UsageError: another tuner has it, the text names its process; or there can be no file beside the database.
            EnvironmentFault: there can be no file in the temporary folder.
        """
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise self._fault(error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 64).decode(errors="replace").strip()
            os.close(descriptor)
            raise UsageError(
                f"another tuner (process {holder or 'unknown'}) is working on study {self._study}; wait for it, "
                "or use another study (`study=NAME` `results=DIR`)"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        self._descriptor = descriptor
        return self

    def _fault(self, error: OSError) -> DsTuneError:
        """The sentence for a lock's file that cannot be opened."""
        refused = f"the folder {self._path.parent} cannot be written to ({error.strerror})"
        if sqlalchemy.engine.make_url(self._storage_url).get_backend_name() == "sqlite":
            return UsageError(f"`storage={masked(self._storage_url)}`: {refused}; name a file elsewhere")
        return EnvironmentFault(f"the lock of study {self._study} cannot be had: {refused}; set TMPDIR to another one")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def lock_file(storage_url: str, study: str) -> Path:
    """Beside a SQLite database, so that every path to it leads to one lock; else in the temporary folder."""
    url = sqlalchemy.engine.make_url(storage_url)
    name = hashlib.sha256(f"{url.render_as_string(hide_password=True)} {study}".encode()).hexdigest()[:16]
    if url.get_backend_name() == "sqlite" and url.database:
        database = Path(url.database).resolve()
        return database.with_name(f"{database.name}.{hashlib.sha256(study.encode()).hexdigest()[:8]}.lock")
    return Path(tempfile.gettempdir()) / f"ds-tune-{os.getuid()}-{name}.lock"
