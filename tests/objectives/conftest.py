"""Real trials on two CPU ranks, faults inside them, and the proof that nothing of them is left."""

import contextlib
import dataclasses
import fcntl
import gc
import json
import os
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.running import local_launcher
from ds_tune.objectives.running.deepspeed_objective import DeepSpeedObjective
from ds_tune.objectives.running.local_launcher import (
    ForkServerProcess,
    LocalLauncher,
    LocalRankProcesses,
    group_environment,
)
from ds_tune.objectives.running.protocol import DEEPSPEED
from ds_tune.objectives.timing.step_plan import StepPlan
from ds_tune.objectives.trial import Outcome, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

FAULTS = Path(__file__).parents[1] / "faults"
QUICK = StepPlan(warmup_steps=1, zero3_extra_warmup_steps=0, min_timed_steps=2, max_timed_steps=2)
MARK = "DS_TUNE_TEST"

READ_BY_IMPORTS = ("PYTHONPATH", "MALLOC_MMAP_THRESHOLD_", "OMP_NUM_THREADS", "DS_ACCELERATOR")
"""Variables that have to be there before a rank's first import, or before its first line."""


class SharedForkServer(ForkServerProcess):
    """What the ranks of many tests are forked from: to import torch, DeepSpeed and transformers takes 8 s of a core.

    What a test has put into the environment since then comes to its ranks with the fork.
    """

    of_the_test: Mapping[str, str] = {}

    def fork(self, environment: Mapping[str, str], process_group: int, descriptors: Sequence[int]) -> None:
        super().fork({**self.of_the_test, **environment}, process_group, descriptors)

    @property
    def descendants(self) -> list[psutil.Process]:
        """Ranks and what they have started, although their environment in /proc is this process's."""
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


class SharedForkServers:
    """One for each set of variables that imports read; a test's own mark is not among them."""

    DESCRIPTORS = 2
    """Of each: the guard's standard input and the socket for requests."""

    def __init__(self) -> None:
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        self._alive: dict[tuple[str | None, ...], SharedForkServer] = {}

    @property
    def alive(self) -> list[SharedForkServer]:
        return list(self._alive.values())

    def serving(self, wanted: Mapping[str, str], stdout: Path, stderr: Path) -> SharedForkServer | None:
        """The one for ranks of this environment; None where a fork cannot bring it about."""
        if "phase=import" in wanted.get("FAULT", "") or self._environment.keys() - wanted.keys():
            return None
        read = {name: wanted[name] for name in READ_BY_IMPORTS if name in wanted}
        # WORLD_SIZE tells tests/faults that ranks are forked here.
        environment = {**self._environment, **read, "WORLD_SIZE": "2"}
        key = tuple(read.get(name) for name in READ_BY_IMPORTS)
        server = self._alive.get(key)
        if server is not None and not server.serves(environment):
            self._alive.pop(key).kill()
            server = None
        if server is None:
            with pytest.MonkeyPatch.context() as patch, stdout.open("ab") as out, stderr.open("ab") as err:
                patch.delenv(MARK, raising=False)  # the guard would have it, and outlives the test
                server = self._alive[key] = SharedForkServer(environment, out, err)
        server.of_the_test = {name: value for name, value in wanted.items() if environment.get(name) != value}
        return server

    def close(self) -> None:
        while self._alive:
            self._alive.popitem()[1].kill()


class SharingLauncher(LocalLauncher):
    """The real launcher, whose ranks on a CPU are forked from what other tests' ranks were forked from."""

    def __init__(self, machine: Machine, servers: SharedForkServers) -> None:
        super().__init__(machine)
        self._servers = servers

    def launch(self, *, stdout: Path, stderr: Path) -> LocalRankProcesses:
        server = None
        if self._machine.device == "cpu":
            server = self._servers.serving(group_environment(self._machine), stdout, stderr)
        if server is None:
            return super().launch(stdout=stdout, stderr=stderr)
        with stdout.open("ab") as out, stderr.open("ab") as err:
            return LocalRankProcesses(self._machine, server, out, err, logs=(stderr, stdout))


@pytest.fixture(scope="session")
def fork_servers() -> Iterator[SharedForkServers]:
    servers = SharedForkServers()
    yield servers
    servers.close()


MACHINE = Machine(device="cpu", name="the test machine", ranks=2, memory_bytes=8 * GIB)
WORKLOAD = HuggingFaceWorkload(model="gpt2-nano", seq_len=32, dtype="fp32")
OWN_ADAM = dataclasses.replace(
    WORKLOAD, base_ds_config={"optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": False}}}
)
"""Trains with DeepSpeed's Adam, which has to be compiled."""


@pytest.fixture
def machine() -> Machine:
    return MACHINE


@pytest.fixture
def workload() -> HuggingFaceWorkload:
    return WORKLOAD


@pytest.fixture
def own_adam() -> HuggingFaceWorkload:
    return OWN_ADAM


COMPILER = """\
#!/bin/sh
exec c++ "$@" -O0 -g0
"""
"""What it compiles is run for a step at most: optimizing and debugging it takes longer than all else."""


@dataclasses.dataclass(frozen=True)
class CompiledAdam:
    """DeepSpeed's CPUAdam, really compiled by ds-tune: for no trial yet, but for some that need it."""

    environment: dict[str, str]
    """With these variables it is found, and compiled by nobody again."""
    extensions: Path
    told: list[str]


@pytest.fixture(scope="session")
def compiled_adam(tmp_path_factory: pytest.TempPathFactory, fork_servers: SharedForkServers) -> CompiledAdam:
    """Once for all workers: it takes more than a minute of a core."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder, compiler = shared / "compiled_adam", shared / "compiled_adam" / "c++"
    environment = {"TORCH_EXTENSIONS_DIR": str(folder / "extensions"), "CXX": str(compiler)}
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "told.json").exists():
            compiler.write_text(COMPILER)
            compiler.chmod(0o755)
            told: list[str] = []
            with pytest.MonkeyPatch.context() as patch, SharingLauncher(MACHINE, fork_servers) as launcher:
                for name, value in environment.items():
                    patch.setenv(name, value)
                tuned = DeepSpeedObjective(
                    OWN_ADAM, MACHINE, launcher=launcher, log_folder=folder, trial_seconds=120, notice=told.append
                )
                try:
                    tuned.prepare(
                        TrialConfig(
                            zero_stage=stage,
                            micro_batch_size=1,
                            gradient_accumulation_steps=1,
                            offload_optimizer="cpu",
                        )
                        for stage in (1, 2)
                    )
                finally:
                    tuned.close()
            (folder / "told.json").write_text(json.dumps(told))
    return CompiledAdam(environment, folder / "extensions", json.loads((folder / "told.json").read_text()))


@pytest.fixture
def config() -> TrialConfig:
    return TrialConfig(zero_stage=1, micro_batch_size=1, gradient_accumulation_steps=1)


@pytest.fixture
def started_processes(
    fork_servers: SharedForkServers, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], list[psutil.Process]]:
    """Lists the processes that this test has started and that still run, however they are related to it."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)

    def running() -> list[psutil.Process]:
        found = []
        for process in {process for server in fork_servers.alive for process in server.descendants}:
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) != mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):  # gone in between, or another user's
                continue
        return found

    return running


@pytest.fixture
def started_ranks(started_processes: Callable[[], list[psutil.Process]]) -> Callable[[], list[psutil.Process]]:
    """Lists those of them that are ranks: they share a command line with the process that they were forked from."""

    def running() -> list[psutil.Process]:
        found = []
        for process in started_processes():
            with contextlib.suppress(psutil.Error):
                parent = process.parent()
                if (
                    local_launcher.FORK_SERVER_MODULE in process.cmdline()
                    and parent
                    and parent.cmdline() == process.cmdline()
                ):
                    found.append(process)
        return found

    return running


@pytest.fixture
def open_files(fork_servers: SharedForkServers) -> Callable[[], int]:
    """Counts the file descriptors of this process, without those that only garbage still holds or all tests share."""

    def count() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd")) - SharedForkServers.DESCRIPTORS * len(fork_servers.alive)

    return count


@pytest.fixture(autouse=True)
def nothing_is_left(started_processes: Callable[[], list[psutil.Process]]) -> Iterator[None]:
    """Fails a test that leaves a process behind, and ends that process."""
    yield
    deadline = time.monotonic() + 60
    while (left := started_processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        process.kill()
    assert left == []


@pytest.fixture
def objective(
    workload: HuggingFaceWorkload,
    machine: Machine,
    tmp_path: Path,
    fork_servers: SharedForkServers,
    open_files: Callable[[], int],
) -> Iterator[Callable[..., DeepSpeedObjective]]:
    """Makes objectives that train the nano model on two CPU ranks, unless told otherwise; no file may stay open.

    With `imports=True` the ranks' start begins with their imports, as it does for a user.
    """
    made: list[DeepSpeedObjective] = []
    resources = contextlib.ExitStack()
    open_before = open_files()

    def make(
        *,
        workload: HuggingFaceWorkload = workload,
        machine: Machine = machine,
        plan: StepPlan = QUICK,
        trial_seconds: float = 120,
        fresh_ranks: bool = False,
        notice: Callable[[str], None] = lambda text: None,
        imports: bool = False,
        trainer: str = DEEPSPEED,
    ) -> DeepSpeedObjective:
        launcher = LocalLauncher(machine) if imports else SharingLauncher(machine, fork_servers)
        made.append(
            DeepSpeedObjective(
                workload,
                machine,
                launcher=resources.enter_context(launcher),
                log_folder=tmp_path / "start",
                trial_seconds=trial_seconds,
                plan=plan,
                fresh_ranks=fresh_ranks,
                trainer=trainer,
                notice=notice,
            )
        )
        return made[-1]

    yield make
    for each in made:
        each.close()
    resources.close()
    assert open_files() == open_before


@pytest.fixture
def train(objective: Callable[..., DeepSpeedObjective], config: TrialConfig, tmp_path: Path) -> Callable[..., Outcome]:
    """Runs one real trial in fresh ranks; takes what `objective` takes."""

    def run(config: TrialConfig = config, **changes: Any) -> Outcome:
        folder = tmp_path / "trial"
        folder.mkdir(exist_ok=True)
        return objective(**changes).run(config, folder, lambda phase: None)

    return run


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Puts a fault into the ranks that are started from here on (see tests/faults); returns FAULT_FILE."""

    def put(text: str) -> Path:
        monkeypatch.setenv("PYTHONPATH", str(FAULTS), prepend=os.pathsep)
        monkeypatch.setenv("FAULT", text)
        # Large blocks come from the kernel, not from what malloc keeps: without memory they fail at once.
        monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
        monkeypatch.setenv("FAULT_FILE", str(tmp_path / "noted"))
        return tmp_path / "noted"

    return put


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> Iterator[Callable[[str], LocalLauncher]]:
    """The real launcher, but its ranks run a script (see tests/faults/scripted_rank.py) in place of a trial."""
    resources = contextlib.ExitStack()

    def make(script: str) -> LocalLauncher:
        monkeypatch.setattr(local_launcher, "WORKER_MODULE", "scripted_rank")
        monkeypatch.setenv("PYTHONPATH", str(FAULTS), prepend=os.pathsep)
        monkeypatch.setenv("RANK_SCRIPT", textwrap.dedent(script))
        return resources.enter_context(LocalLauncher(machine))

    yield make
    resources.close()
