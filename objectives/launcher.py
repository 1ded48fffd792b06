"""Starts the processes of one rank group and ends them: how ranks come to be, not what they are told.

`Launcher` is the protocol; another way to start ranks (a host file, Slurm, MPI) is another class like
`LocalLauncher`. Each rank has two pipes: commands arrive on its standard input, and events, one JSON document a
line, leave on a descriptor of their own, so that nothing a library prints can be mistaken for one.
"""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO, Protocol

from objectives import guard
from objectives.machine import Machine

WORKER_MODULE = "objectives.rank.worker"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankProcess:
    """One started rank and the tuner's ends of its pipes."""

    rank: int
    process: subprocess.Popen[bytes]
    commands: IO[bytes]
    events: IO[bytes]


class RankProcesses(Protocol):
    """The started processes of a group."""

    ranks: list[RankProcess]

    def kill(self) -> None:
        """Ends every process of the group at once and waits until none is left; may be called again."""


class Launcher(Protocol):
    """A way to start the ranks of a group."""

    def launch(self, *, stdout: Path, stderr: Path) -> RankProcesses:
        """Starts all ranks; their output is appended to the two files."""


class LocalLauncher:
    """Starts the ranks on this machine, in one process group that dies with the tuner."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def launch(self, *, stdout: Path, stderr: Path) -> "LocalRankProcesses":
        return LocalRankProcesses(self._machine, stdout=stdout, stderr=stderr)


class LocalRankProcesses:
    """See `RankProcesses`."""

    def __init__(self, machine: Machine, *, stdout: Path, stderr: Path) -> None:
        self.ranks: list[RankProcess] = []
        # The guard comes first and leads the process group: no rank ever runs without it.
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__], stdin=subprocess.PIPE, process_group=0
        )
        try:
            self._start(machine, stdout, stderr)
        except BaseException:
            self.kill()
            raise

    def _start(self, machine: Machine, stdout: Path, stderr: Path) -> None:
        with contextlib.ExitStack() as files:
            # Rank 0 inherits this listening socket as its rendezvous, so no port can be taken in between.
            rendezvous = files.enter_context(socket.create_server(("127.0.0.1", 0), backlog=machine.ranks + 8))
            out = files.enter_context(stdout.open("ab"))
            err = files.enter_context(stderr.open("ab"))
            for rank in range(machine.ranks):
                read_end, write_end = os.pipe()
                events = files.enter_context(os.fdopen(write_end, "wb"))
                inherited = [events.fileno()] + ([rendezvous.fileno()] if rank == 0 else [])
                process = subprocess.Popen(
                    [
                        sys.executable,
                        "-P",
                        "-m",
                        WORKER_MODULE,
                    ],  # -P: nothing in the user's folder shadows a package
                    stdin=subprocess.PIPE,
                    stdout=out,
                    stderr=err,
                    pass_fds=inherited,
                    process_group=self._guard.pid,
                    env=rank_environment(
                        machine,
                        rank,
                        rendezvous_port=rendezvous.getsockname()[1],
                        rendezvous_fd=rendezvous.fileno() if rank == 0 else None,
                        event_fd=events.fileno(),
                    ),
                )
                assert process.stdin is not None
                self.ranks.append(
                    RankProcess(
                        rank=rank,
                        process=process,
                        commands=process.stdin,
                        events=os.fdopen(read_end, "rb", buffering=0),
                    )
                )

    def kill(self) -> None:
        # The guard is reaped last: until then its id, which is the group's, cannot be another's.
        with contextlib.suppress(ProcessLookupError):
            if self._guard.returncode is None:
                os.killpg(self._guard.pid, signal.SIGKILL)
        for rank in self.ranks:
            rank.process.wait()
            with contextlib.suppress(OSError):
                rank.commands.close()
            rank.events.close()
        self._guard.wait()
        assert self._guard.stdin is not None
        self._guard.stdin.close()


def rank_environment(
    machine: Machine, rank: int, *, rendezvous_port: int, rendezvous_fd: int | None, event_fd: int
) -> dict[str, str]:
    """What a rank finds in its environment: the names every torch launcher sets, and the two pipes."""
    environment = {
        **os.environ,
        # torch looks there for ninja when DeepSpeed compiles an op, and a .venv need not be activated.
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(machine.ranks),
        "LOCAL_WORLD_SIZE": str(machine.ranks),
        "LOCAL_SIZE": str(machine.ranks),  # DeepSpeed's CPU accelerator counts its devices by this
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(rendezvous_port),
        "DS_TUNE_EVENT_FD": str(event_fd),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if rendezvous_fd is not None:
        environment["DS_TUNE_RENDEZVOUS_FD"] = str(rendezvous_fd)
    # gloo looks up the host's own name to choose an interface, and many machines cannot resolve theirs.
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if machine.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
        environment.setdefault("OMP_NUM_THREADS", str(threads_per_rank(machine)))
    return environment


def threads_per_rank(machine: Machine) -> int:
    """Cores a CPU rank may keep busy, at least one."""
    return max(len(os.sched_getaffinity(0)) // machine.ranks, 1)
