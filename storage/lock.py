"""One tuner a study: an exclusive lock that the kernel releases however its holder ends."""

import contextlib
import fcntl
import hashlib
import os
import pwd
import stat
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
            descriptor = self._open()
        except OSError as error:
            raise self._fault(error) from error
        try:
            _take(descriptor)
        except BlockingIOError:
            holder = os.read(descriptor, 64).decode(errors="replace").strip()
            os.close(descriptor)
            raise UsageError(
                f"another tuner (process {holder or 'unknown'}) is working on study {self._study}; wait for it, "
                "or use another study (`study=NAME` `results=DIR`)"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise UsageError(
                f"{self._path} cannot be locked ({error.strerror}): its file system has no locks; keep the study on "
                "another one, such as `storage=sqlite:////tmp/study.db`"
            ) from error
        with contextlib.suppress(OSError):  # another user's, which may only be read
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        self._descriptor = descriptor
        return self

    def _open(self) -> int:
        """Opens the lock's file, and makes it where there is none, for those to whom the database is open.

        To lock it, it is enough to read it.
        """
        with contextlib.suppress(FileExistsError):
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, self._mode())
        try:
            # Without O_CREAT: in a folder such as /tmp Linux refuses that for another user's file.
            return os.open(self._path, os.O_RDWR)
        except PermissionError:
            return os.open(self._path, os.O_RDONLY)

    def _mode(self) -> int:
        """Permissions of the lock's file; the umask still counts."""
        url = sqlalchemy.engine.make_url(self._storage_url)
        if url.get_backend_name() != "sqlite" or not url.database:
            return 0o600  # the file's name has the user's number
        with contextlib.suppress(OSError):
            return stat.S_IMODE(os.stat(url.database).st_mode) & 0o666
        return 0o666

    def _fault(self, error: OSError) -> DsTuneError:
        """The sentence for a lock's file that cannot be opened."""
        with contextlib.suppress(OSError):
            owner = self._path.stat().st_uid
            return UsageError(
                f"the lock {self._path} is of user {_user_name(owner)} and cannot be opened ({error.strerror}); "
                "have it removed or made readable while no tuner runs, or use another study (`study=NAME`)"
            )
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


def _take(descriptor: int) -> None:
    """Locks a file for this process, by flock or, where a file system has none, as POSIX has it.

    Raises:
        BlockingIOError: another process has it.
        OSError: the file system has neither.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except PermissionError as error:  # some systems' word for it
            raise BlockingIOError(*error.args) from error


def _user_name(number: int) -> str:
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(number).pw_name
    return str(number)


def lock_file(storage_url: str, study: str) -> Path:
    """Beside a SQLite database, so that every path to it leads to one lock; else in the temporary folder."""
    url = sqlalchemy.engine.make_url(storage_url)
    name = hashlib.sha256(f"{url.render_as_string(hide_password=True)} {study}".encode()).hexdigest()[:16]
    if url.get_backend_name() == "sqlite" and url.database:
        database = Path(url.database).resolve()
        return database.with_name(f"{database.name}.{hashlib.sha256(study.encode()).hexdigest()[:8]}.lock")
    return Path(tempfile.gettempdir()) / f"ds-tune-{os.getuid()}-{name}.lock"
