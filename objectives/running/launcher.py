"""Contract of starting the ranks of a group and ending them: how ranks come to be, not what they are told.

Each rank has two pipes: commands arrive on its standard input, and events, one JSON document a line, leave on a
descriptor of their own, so that nothing a library prints can be mistaken for one.
"""

import dataclasses
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, Self

SCRATCH = "scratch"
"""Folder beside a trial's logs for what its ranks insist on writing; gone when they are, however they ended."""


class RankExit(Protocol):
    """The end of a rank's process."""

    def wait(self) -> int:
        """Its exit status as `subprocess.Popen.returncode` has it, once it has ended."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankProcess:
    """One started rank and the tuner's ends of its pipes."""

    rank: int
    process: RankExit
    commands: IO[bytes]
    events: IO[bytes]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Facts on a rank's host that may tell why the rank failed."""

    log_end: str
    """The last lines that the host's ranks wrote: standard error, or standard output where that is empty."""
    oom_kills: int
    """Processes that the host's kernel killed for memory since the ranks were last told to log elsewhere."""


class RankProcesses(Protocol):
    """The started processes of a group. Whatever is local to a rank's host is read here, and nowhere else."""

    ranks: list[RankProcess]

    def log_to(self, folder: Path) -> None:
        """Begins new log files, `stdout.log` and `stderr.log`, in a folder on each rank's host, and makes the folder
        where it is missing. Ranks send their output there themselves, when a command names the folder."""

    def evidence(self, rank: int) -> Evidence:
        """Returns what is known on the host of a rank."""

    def kill(self) -> None:
        """Ends every process of the group at once and waits until none is left, and removes what they had in `SCRATCH`;
        may be called again."""


class Launcher(Protocol):
    """A way to start the ranks of a group. After its `with` nothing is left but the groups that were not killed."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def launch(self, *, stdout: Path, stderr: Path) -> RankProcesses:
        """Starts all ranks; their output is appended to the two files."""
