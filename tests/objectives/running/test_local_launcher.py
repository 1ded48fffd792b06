"""How the processes of a group are started, and that they end with it however the tuner ends."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from ds_tune.objectives.machine import GIB, Machine, detect_machine
from ds_tune.objectives.running import local_launcher as launcher_module
from ds_tune.objectives.running.local_launcher import (
    LocalLauncher,
    LocalRankProcesses,
    group_environment,
    rank_environment,
    threads_per_rank,
)

Scripted = Callable[[str], LocalLauncher]
Imported = Callable[..., LocalLauncher]
Running = Callable[[], list[psutil.Process]]

# A tuner that runs one trial which never ends by itself.
TUNER = """
from pathlib import Path
from ds_tune.objectives.running.deepspeed_objective import DeepSpeedObjective
from ds_tune.objectives.running.local_launcher import LocalLauncher
from ds_tune.objectives.machine import Machine
from ds_tune.objectives.timing.step_plan import StepPlan
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

folder = Path({folder!r})
machine = Machine(device="cpu", name="test", ranks=2, memory_bytes=2**33)
objective = DeepSpeedObjective(
    HuggingFaceWorkload(model="gpt2-nano", seq_len=32, dtype="fp32"),
    machine,
    launcher=LocalLauncher(machine),
    log_folder=folder,
    trial_seconds=3600,
    plan=StepPlan(min_timed_steps=10**9, max_timed_steps=10**9),
)
config = TrialConfig(zero_stage=1, micro_batch_size=1, gradient_accumulation_steps=1)
objective.run(config, folder, lambda phase: print(phase, flush=True))
"""


@pytest.fixture
def killed_tuner(tmp_path: Path, started_processes: Running) -> Callable[..., None]:
    """Starts a tuner and gives it SIGKILL in the middle of a phase, when the notes are there that a fault leaves."""

    def kill(phase: str, notes: Sequence[Path] = ()) -> None:
        command = [sys.executable, "-c", TUNER.format(folder=str(tmp_path))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as tuner:
            assert tuner.stdout is not None
            assert any(line.strip() == phase for line in tuner.stdout), f"the tuner ended before {phase}"
            deadline = time.monotonic() + 180
            while len(started_processes()) < 4 or not all(note.exists() for note in notes):
                assert time.monotonic() < deadline, "the ranks did not get there"
                time.sleep(0.05)
            tuner.kill()

    return kill


def assert_gone_soon(running: Running, *, but: int = 0) -> None:
    """A killed process that nobody waits for takes a moment to end."""
    deadline = time.monotonic() + 60
    while len(running()) > but and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(running()) == but


def test_no_rank_outlives_a_tuner_that_is_killed_while_they_start(
    killed_tuner: Callable[..., None], started_processes: Running
) -> None:
    killed_tuner("start")
    assert_gone_soon(started_processes)


def test_neither_ranks_nor_what_they_started_outlive_a_tuner_that_is_killed_during_a_trial(
    killed_tuner: Callable[..., None], started_processes: Running, fault: Callable[[str], Path]
) -> None:
    note = fault("rank=1 phase=forward kind=child_and_hang")
    killed_tuner("warm-up", [Path(f"{note}.1")])
    assert_gone_soon(started_processes)


def test_ranks_that_are_deaf_to_sigterm_and_hold_the_gil_do_not_outlive_a_killed_tuner(
    killed_tuner: Callable[..., None], started_processes: Running, fault: Callable[[str], Path]
) -> None:
    note = fault("rank=* phase=model kind=stubborn")
    killed_tuner("config", [Path(f"{note}.{rank}") for rank in range(2)])
    assert_gone_soon(started_processes)


def test_each_rank_has_pipes_of_its_own_that_printing_does_not_disturb(scripted: Scripted, tmp_path: Path) -> None:
    launcher = scripted("""
        print('{"event": "not really"}')
        print("a library's warning", file=sys.stderr)
        send("heard", word=receive()["word"], rank=rank)
    """)
    stdout, stderr = tmp_path / "stdout.log", tmp_path / "stderr.log"
    processes = launcher.launch(stdout=stdout, stderr=stderr)
    try:
        for rank in processes.ranks:
            rank.commands.write(b'{"word": "%d"}\n' % rank.rank)
            rank.commands.flush()
        for rank in processes.ranks:
            assert rank.events.read(65536) == b'{"event": "heard", "word": "%d", "rank": %d}\n' % (rank.rank, rank.rank)
    finally:
        processes.kill()
    assert stdout.read_text().count("not really") == 2
    assert stderr.read_text().count("a library's warning") == 2


def test_killing_a_group_ends_every_process_in_it_and_can_be_repeated(
    scripted: Scripted, tmp_path: Path, started_processes: Running, open_files: Callable[[], int]
) -> None:
    before = open_files()
    launcher = scripted("""
        import signal, subprocess, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen(["sleep", "3600"])
        send("ready")
        time.sleep(3600)
    """)
    for _ in range(3):
        processes = launcher.launch(stdout=tmp_path / "stdout.log", stderr=tmp_path / "stderr.log")
        for rank in processes.ranks:
            assert b"ready" in rank.events.read(65536)
        # Two ranks, a child of each, what they were forked from, and the guards of that and of the group.
        assert len(started_processes()) == 7
        processes.kill()
        processes.kill()
        assert [rank.process.wait() for rank in processes.ranks] == [-signal.SIGKILL] * 2
        assert_gone_soon(started_processes, but=2)
    launcher.close()
    assert_gone_soon(started_processes)
    assert open_files() == before


def test_a_group_that_cannot_start_leaves_nothing(
    scripted: Scripted, tmp_path: Path, started_processes: Running, open_files: Callable[[], int]
) -> None:
    before = open_files()
    with pytest.raises(FileNotFoundError):
        scripted("").launch(stdout=tmp_path / "missing" / "stdout.log", stderr=tmp_path / "stderr.log")
    assert_gone_soon(started_processes)
    assert open_files() == before


def test_a_rank_takes_nothing_from_the_folder_it_is_started_in(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    processes = scripted('send("ready")').launch(stdout=tmp_path / "stdout.log", stderr=tmp_path / "stderr.log")
    try:
        assert b"ready" in processes.ranks[0].events.read(65536)
    finally:
        processes.kill()


def test_rank_0_inherits_the_listening_socket_so_that_no_port_is_lost(scripted: Scripted, tmp_path: Path) -> None:
    launcher = scripted("""
        import socket
        if rank == 0:
            server = socket.socket(fileno=int(os.environ["DS_TUNE_RENDEZVOUS_FD"]))
            send("port", port=server.getsockname()[1], same=str(server.getsockname()[1]) == os.environ["MASTER_PORT"])
            server.accept()
            send("accepted")
    """)
    processes = launcher.launch(stdout=tmp_path / "stdout.log", stderr=tmp_path / "stderr.log")
    try:
        events = processes.ranks[0].events
        port = int(events.read(65536).split(b'"port": ')[1].split(b",")[0])
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        assert b"accepted" in events.read(65536)
    finally:
        processes.kill()


def told(processes: LocalRankProcesses) -> list[dict[str, Any]]:
    """The event that each rank sends first."""
    try:
        return [json.loads(rank.events.read(65536)) for rank in processes.ranks]
    finally:
        processes.kill()


def test_groups_are_forked_from_one_process_as_long_as_the_environment_is_the_same(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = scripted('send("parent", pid=os.getppid(), word=os.environ.get("WORD"))')
    logs = {"stdout": tmp_path / "stdout.log", "stderr": tmp_path / "stderr.log"}
    first, second = told(launcher.launch(**logs)), told(launcher.launch(**logs))
    assert len({event["pid"] for event in first + second}) == 1
    monkeypatch.setenv("WORD", "imports may depend on it")
    third = told(launcher.launch(**logs))
    assert [event["word"] for event in third] == ["imports may depend on it"] * 2
    assert not {event["pid"] for event in third} & {event["pid"] for event in first}


def test_a_rank_whose_fork_came_too_late_starts_over_with_the_same_pipes(scripted: Scripted, tmp_path: Path) -> None:
    launcher = scripted("""
        from ds_tune.objectives.rank.fork_server import start_over
        if "AGAIN" not in os.environ:
            os.environ["AGAIN"] = "1"
            start_over("scripted_rank")
        rendezvous = os.environ.get("DS_TUNE_RENDEZVOUS_FD")
        is_open = rendezvous is not None and os.fstat(int(rendezvous)).st_size == 0
        send("ready", rank=rank, heard=receive(), main=__name__, rendezvous=is_open)
    """)
    processes = launcher.launch(stdout=tmp_path / "stdout.log", stderr=tmp_path / "stderr.log")
    for rank in processes.ranks:
        rank.commands.write(b"{}\n")
        rank.commands.flush()
    events = told(processes)
    assert [(event["rank"], event["heard"], event["main"]) for event in events] == [
        (rank, {}, "__main__") for rank in range(2)
    ]
    assert [event["rendezvous"] for event in events] == [True, False]


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: Machine) -> Iterator[Imported]:
    """The real launcher, with a module of these lines in place of what ranks import and run."""
    with contextlib.ExitStack() as resources:

        def make(lines: str, machine: Machine = machine) -> LocalLauncher:
            (tmp_path / "what_ranks_import.py").write_text(lines)
            monkeypatch.setattr(launcher_module, "WORKER_MODULE", "what_ranks_import")
            monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
            return resources.enter_context(LocalLauncher(machine))

        yield make


def test_a_group_whose_ranks_are_still_to_come_is_killed_at_once(
    imported: Imported, tmp_path: Path, started_processes: Running
) -> None:
    launcher = imported("import time\ntime.sleep(3600)")
    for _ in range(2):
        processes = launcher.launch(stdout=tmp_path / "stdout.log", stderr=tmp_path / "stderr.log")
        processes.kill()  # and does not wait for the hour to pass
        assert_gone_soon(started_processes)


def test_imports_that_fail_end_all_ranks_and_are_tried_again_for_the_next_group(
    imported: Imported, tmp_path: Path
) -> None:
    launcher = imported("raise SystemExit('no such library')")
    logs = {"stdout": tmp_path / "stdout.log", "stderr": tmp_path / "stderr.log"}
    for times in (1, 2):
        processes = launcher.launch(**logs)
        assert [rank.events.read(65536) for rank in processes.ranks] == [b"", b""]
        assert [rank.process.wait() for rank in processes.ranks] == [1, 1]
        processes.kill()
        assert logs["stderr"].read_text().count("no such library") == times


def test_ranks_end_as_a_program_does(imported: Imported, tmp_path: Path) -> None:
    launcher = imported("""
import atexit, os
def main():
    atexit.register(print, "goodbye of rank", os.environ["RANK"])
    if os.environ["RANK"] == "1":
        raise ValueError("a traceback")
""")
    processes = launcher.launch(stdout=tmp_path / "stdout.log", stderr=tmp_path / "stderr.log")
    assert [rank.process.wait() for rank in processes.ranks] == [0, 1]
    processes.kill()
    assert sorted((tmp_path / "stdout.log").read_text().splitlines()) == ["goodbye of rank 0", "goodbye of rank 1"]
    assert "ValueError: a traceback" in (tmp_path / "stderr.log").read_text()


@pytest.mark.gpu
def test_importing_the_worker_touches_no_gpu_so_forked_ranks_do_not_start_over(
    imported: Imported, tmp_path: Path
) -> None:
    launcher = imported(
        """
import os
import ds_tune.objectives.rank.worker
def main():
    os.write(int(os.environ["DS_TUNE_EVENT_FD"]), b'{"forked": true}')
""",
        detect_machine(gpus=1, cpu_ranks=2, memory_cap_bytes=None),
    )
    processes = launcher.launch(stdout=tmp_path / "stdout.log", stderr=tmp_path / "stderr.log")
    assert told(processes) == [{"forked": True}]  # a rank that starts over finds no main() called


def environment(machine: Machine, rank: int) -> dict[str, str]:
    return group_environment(machine) | rank_environment(rank, rendezvous_port=1234)


def test_a_rank_finds_what_every_torch_launcher_sets(machine: Machine) -> None:
    found = environment(machine, 1)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [found[name] for name in names] == ["1", "1", "2", "2", "127.0.0.1", "1234"]


def test_cpu_ranks_share_the_cores_unless_the_user_says_otherwise(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert environment(machine, 0)["OMP_NUM_THREADS"] == str(threads_per_rank(machine))
    assert threads_per_rank(machine) * machine.ranks <= max(len(os.sched_getaffinity(0)), machine.ranks)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert environment(machine, 0)["OMP_NUM_THREADS"] == "7"


def test_gpu_ranks_are_left_with_the_accelerator_that_deepspeed_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    machine = Machine(device="cuda", name="NVIDIA H200", ranks=1, device_ids=(0,), memory_bytes=140 * GIB)
    assert "DS_ACCELERATOR" not in environment(machine, 0)
