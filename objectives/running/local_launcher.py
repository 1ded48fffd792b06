"""Starts the ranks of a group on this machine, and ends them. See `objectives.running.launcher`.

`LocalLauncher` has a process import once what ranks need, and fork them (`objectives.rank.fork_server`): a fresh rank
has a CUDA context, an allocator and communicators of its own, but is spared seconds of imports. That process and each
group have a guard, which ends them with the tuner.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from ds_tune.objectives.machine import Machine
from ds_tune.objectives.running import guard
from ds_tune.objectives.running.job_environment import without_job
from ds_tune.objectives.running.launcher import SCRATCH, Evidence, RankProcess

WORKER_MODULE = "ds_tune.objectives.rank.worker"
FORK_SERVER_MODULE = "ds_tune.objectives.rank.fork_server"
LOGS = ("stderr.log", "stdout.log")
"""Log files of a trial, the one that tells most first."""

EVIDENCE_LINES = 400
EVIDENCE_CHARACTERS = 40_000
"""How far back the last words of a rank are looked for, after which its peers wrote their tracebacks."""

EXIT_LINE = re.compile(rb"^exit (-?\d+)\n", re.MULTILINE)


class GuardedGroup:
    """A process group that ends with the tuner, however the tuner ends."""

    def __init__(self) -> None:
        # The guard comes first and leads the group: nothing in it ever runs without one.
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__], stdin=subprocess.PIPE, process_group=0
        )

    @property
    def id(self) -> int:
        return self._guard.pid

    def signal_all(self) -> None:
        """Sends SIGKILL to every process of the group, unless that was done and `reap` was called."""
        with contextlib.suppress(ProcessLookupError):
            if self._guard.returncode is None:
                os.killpg(self._guard.pid, signal.SIGKILL)

    def reap(self) -> None:
        """Comes last: until then the guard's id, which is the group's, cannot be another's."""
        self._guard.wait()
        assert self._guard.stdin is not None
        self._guard.stdin.close()


class LocalLauncher:
    """Starts ranks on this machine. Behind its `with` nothing is left but the groups that were not killed."""

    def __init__(
        self, machine: Machine, *, worker: str | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        """
        Args:
            worker: module whose `main()` each rank runs; None for that of built-in models.
            environment: variables that ranks have from before their first import on, whatever the tuner has.
        """
        self._environment = dict(environment or {})
        self._machine = machine
        self._worker = worker or WORKER_MODULE
        self._fork_server: ForkServerProcess | None = None

    def __enter__(self) -> "LocalLauncher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def launch(self, *, stdout: Path, stderr: Path) -> "LocalRankProcesses":
        environment = {**group_environment(self._machine), **self._environment}
        if self._fork_server is not None and not self._fork_server.serves(environment):
            self.close()
        with stdout.open("ab") as out, stderr.open("ab") as err:
            if self._fork_server is None:
                self._fork_server = ForkServerProcess(environment, out, err, worker=self._worker)
            return LocalRankProcesses(self._machine, self._fork_server, out, err, logs=(stderr, stdout))

    def close(self) -> None:
        """Ends what the next group would have been forked from; may be called again, and so may `launch`."""
        if self._fork_server is not None:
            self._fork_server.kill()
            self._fork_server = None


class ForkServerProcess:
    """The tuner's side of the process that ranks are forked from; `objectives.rank.fork_server` has the protocol."""

    def __init__(
        self, environment: Mapping[str, str], stdout: IO[bytes], stderr: IO[bytes], *, worker: str | None = None
    ) -> None:
        """
        Args:
            stdout, stderr: get what the imports print.
        """
        self._environment = dict(environment)
        self._group = GuardedGroup()
        # One message is one request.
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                # -P: nothing in the user's folder shadows a package
                [sys.executable, "-P", "-m", FORK_SERVER_MODULE, worker or WORKER_MODULE, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                pass_fds=[theirs.fileno()],
                process_group=self._group.id,
                env={**environment, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
            )

    def serves(self, environment: Mapping[str, str]) -> bool:
        """Whether it is alive and what it imported was imported under this environment."""
        return self._process.poll() is None and self._environment == environment

    def fork(self, environment: Mapping[str, str], process_group: int, descriptors: Sequence[int]) -> None:
        """Asks for a rank; where this process has ended, the rank's pipes close as if it had ended, too."""
        message = json.dumps({"process_group": process_group, "environment": dict(environment)}).encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self._requests, [message], descriptors)

    def wait(self) -> int:
        """The exit status of this process."""
        return self._process.wait()

    def kill(self) -> None:
        self._group.signal_all()
        self._process.wait()
        self._group.reap()
        self._requests.close()


class ForkedRank:
    """A rank's process, of which the fork server is the parent. See `RankExit`."""

    def __init__(self, fork_server: ForkServerProcess, told: IO[bytes]) -> None:
        self._fork_server = fork_server
        self._told = told
        self._lines = b""
        self.returncode: int | None = None

    def is_forked(self) -> bool:
        """Whether its process is known to be in its group."""
        os.set_blocking(self._told.fileno(), False)
        try:
            self._lines += self._told.read(64) or b""
        finally:
            os.set_blocking(self._told.fileno(), True)
        return b"\n" in self._lines

    def wait(self) -> int:
        if self.returncode is None:
            while (ended := EXIT_LINE.search(self._lines)) is None and (told := self._told.read(64)):
                self._lines += told
            self._told.close()
            # Whoever cannot be forked any more has ended as the fork server has.
            self.returncode = int(ended[1]) if ended is not None else self._fork_server.wait()
        return self.returncode


class LocalRankProcesses:
    """See `RankProcesses`."""

    def __init__(
        self,
        machine: Machine,
        fork_server: ForkServerProcess,
        stdout: IO[bytes],
        stderr: IO[bytes],
        *,
        logs: tuple[Path, ...],
    ) -> None:
        """
        Args:
            logs: the files behind the two streams, the one that tells most first.
        """
        self.ranks: list[RankProcess] = []
        self._logs = logs
        self._scratch: Path | None = None
        self._oom_kills_before = host_oom_kills()
        self._fork_server = fork_server
        self._forked: list[ForkedRank] = []
        self._group = GuardedGroup()
        try:
            # Rank 0 inherits this listening socket as its rendezvous, so no port can be taken in between.
            with socket.create_server(("127.0.0.1", 0), backlog=machine.ranks + 8) as rendezvous:
                for rank in range(machine.ranks):
                    environment = rank_environment(rank, rendezvous_port=rendezvous.getsockname()[1])
                    self._start(rank, environment, [stdout, stderr], [rendezvous] if rank == 0 else [])
        except BaseException:
            self.kill()
            raise

    def _start(
        self, rank: int, environment: Mapping[str, str], logs: Sequence[IO[bytes]], sockets: Sequence[socket.socket]
    ) -> None:
        with contextlib.ExitStack() as theirs:
            commands, events, told = os.pipe(), os.pipe(), os.pipe()
            for descriptor in (commands[0], events[1], told[1]):
                theirs.callback(os.close, descriptor)
            self._fork_server.fork(
                environment,
                self._group.id,
                [
                    commands[0],
                    *(log.fileno() for log in logs),
                    events[1],
                    told[1],
                    *(listening.fileno() for listening in sockets),
                ],
            )
            process = ForkedRank(self._fork_server, os.fdopen(told[0], "rb", buffering=0))
            self._forked.append(process)
            self.ranks.append(
                RankProcess(
                    rank=rank,
                    process=process,
                    commands=os.fdopen(commands[1], "wb"),
                    events=os.fdopen(events[0], "rb", buffering=0),
                )
            )

    def log_to(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._logs = tuple(folder / name for name in LOGS)
        for log in self._logs:
            log.write_bytes(b"")
        self._scratch = folder / SCRATCH
        self._oom_kills_before = host_oom_kills()

    def evidence(self, rank: int) -> Evidence:
        return Evidence(log_end=_log_end(self._logs), oom_kills=host_oom_kills() - self._oom_kills_before)

    def kill(self) -> None:
        waiting = [process for process in self._forked if process.returncode is None]
        if not all(process.is_forked() for process in waiting):
            self._fork_server.kill()  # it still imports, and would fork them when it is done
        self._group.signal_all()
        for rank in self.ranks:
            rank.process.wait()
            with contextlib.suppress(OSError):
                rank.commands.close()
            rank.events.close()
        self._group.reap()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)


def _log_end(logs: Sequence[Path]) -> str:
    """The last lines of the first log file that has any."""
    for path in logs:
        with contextlib.suppress(OSError):
            text = path.read_text(errors="replace").strip()
            if text:
                return "\n".join(text.splitlines()[-EVIDENCE_LINES:])[-EVIDENCE_CHARACTERS:]
    return ""


def host_oom_kills() -> int:
    """Processes that the kernel has killed for memory since boot; 0 where it does not say."""
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0


def group_environment(machine: Machine) -> dict[str, str]:
    """Environment that all ranks have in common, from before their first import on."""
    environment = {
        **without_job(os.environ),
        # torch looks there for ninja when DeepSpeed compiles an op, and a .venv need not be activated.
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]),
        "WORLD_SIZE": str(machine.ranks),
        "LOCAL_WORLD_SIZE": str(machine.ranks),
        "LOCAL_SIZE": str(machine.ranks),  # DeepSpeed's CPU accelerator counts its devices by this
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # gloo looks up the host's own name to choose an interface, and many machines cannot resolve theirs.
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if machine.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
        environment.setdefault("OMP_NUM_THREADS", str(threads_per_rank(machine)))
    return environment


def rank_environment(rank: int, *, rendezvous_port: int) -> dict[str, str]:
    """Environment of one rank beside that, under the names that every torch launcher sets."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(rendezvous_port),
    }


def threads_per_rank(machine: Machine) -> int:
    """Cores a CPU rank may keep busy, at least one."""
    return max(len(os.sched_getaffinity(0)) // machine.ranks, 1)
