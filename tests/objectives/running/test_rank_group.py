"""The tuner's side of a group: commands, events, and what it makes of ranks that fail, die or hang.

The ranks are scripts (see tests/faults/scripted_rank.py); real ones that fail are in rank/test_worker.py.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ds_tune.objectives.errors import EnvironmentFault, UsageError
from ds_tune.objectives.machine import Machine
from ds_tune.objectives.numerics import LossCurve
from ds_tune.objectives.running.local_launcher import LocalLauncher
from ds_tune.objectives.running.protocol import Losses, RankContext
from ds_tune.objectives.running.rank_group import RankGroup
from ds_tune.objectives.trial import Failure, FailureKind, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

READY = 'receive(); send("ready"); folder = receive()["log_folder"];'


def losses_of(folder: Path, micro_batch_size: int = 1) -> Losses:
    config = TrialConfig(zero_stage=1, micro_batch_size=micro_batch_size, gradient_accumulation_steps=1)
    return Losses(config=config, log_folder=folder, steps=1, seconds_per_sample=None)


def curves(*losses: float) -> list[LossCurve]:
    return [LossCurve(losses=(loss,), skipped_steps=0) for loss in losses]


@pytest.fixture
def context(workload: HuggingFaceWorkload, machine: Machine) -> RankContext:
    return RankContext(workload=workload, machine=machine)


@pytest.fixture
def group(
    scripted: Callable[[str], LocalLauncher], tmp_path: Path, open_files: Callable[[], int]
) -> Iterator[Callable[[str], RankGroup]]:
    """Starts a group whose ranks run a script; it is killed behind the test, and no file of it stays open."""
    groups: list[RankGroup] = []
    launchers: list[LocalLauncher] = []
    before = open_files()

    def start(script: str) -> RankGroup:
        launchers.append(scripted(script))
        groups.append(RankGroup(launchers[-1], stdout=tmp_path / "stdout.log", stderr=tmp_path / "stderr.log"))
        return groups[-1]

    yield start
    for group in groups:
        group.kill()
    for launcher in launchers:
        launcher.close()
    assert open_files() == before


@pytest.fixture
def outcome(
    group: Callable[[str], RankGroup], context: RankContext, tmp_path: Path
) -> Callable[..., list[LossCurve] | Failure]:
    """What a trial ends in whose ranks do this once they are asked to run it."""

    def run(script: str, *, seconds: float = 30, phases: list[str] | None = None) -> list[LossCurve] | Failure:
        started = group(f"{READY}\n{script}")
        assert started.setup(context) is None
        on_phase = (lambda phase: None) if phases is None else phases.append
        return started.run(losses_of(tmp_path), seconds=seconds, on_phase=on_phase)

    return run


Outcome = Callable[..., Any]


def test_a_trial_gives_each_rank_s_document_and_tells_rank_0_s_phases(outcome: Outcome) -> None:
    phases: list[str] = []
    script = 'send("phase", phase=f"phase of {rank}"); finish()'
    assert outcome(script, phases=phases) == curves(0.0, 1.0)
    assert phases == ["phase of 0"]


def test_a_group_can_run_one_trial_after_another(
    group: Callable[[str], RankGroup], context: RankContext, tmp_path: Path
) -> None:
    started = group("""
receive()
send("ready")
while True:
    finish(receive()["config"]["micro_batch_size"])
""")
    started.setup(context)
    for size in (1, 2, 4):
        answer = started.run(losses_of(tmp_path, size), seconds=30, on_phase=lambda phase: None)
        assert answer == curves(size, size)


RELEASED = 'send("released", left_bytes={"device": 0, "host": 0}, collectives=[7])'


@pytest.fixture
def aftermath(group: Callable[[str], RankGroup], context: RankContext, tmp_path: Path) -> Callable[[str], str | None]:
    """Why ranks that do this once they are asked to run a trial cannot run another one."""

    def reason_to_replace(script: str) -> str | None:
        started = group(f"{READY}\n{script}")
        started.setup(context)
        started.run(losses_of(tmp_path), seconds=30, on_phase=lambda phase: None)
        return started.reason_to_replace()

    return reason_to_replace


FINISHED = "finish()"
OUT_OF_MEMORY = 'fail("out_of_memory", "gone", "forward")'


@pytest.mark.parametrize("ending", [FINISHED, OUT_OF_MEMORY], ids=["finished", "all out of memory"])
def test_ranks_that_gave_back_what_they_held_run_on(aftermath: Callable[[str], str | None], ending: str) -> None:
    assert aftermath(f"{ending}\n{RELEASED}\nreceive()") is None


def test_a_rank_that_gives_back_before_its_peer_has_finished_is_not_missed(
    aftermath: Callable[[str], str | None],
) -> None:
    assert aftermath(f"import time; time.sleep(0.5 * rank)\n{FINISHED}\n{RELEASED}\nreceive()") is None


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (f"{FINISHED}\n{RELEASED.replace('0}', '2 ** 31}')}\nreceive()", "left 2.00 GiB of host memory"),
        (f"{OUT_OF_MEMORY}\n{RELEASED.replace('[7]', '[7 + rank]')}\nreceive()", "failed at different points"),
        (FINISHED, "did not give back"),
        ("os._exit(3)", "its processes were ended"),
        (f"{OUT_OF_MEMORY.replace('out_of_memory', 'crash')}\n{RELEASED}", "its processes were ended"),
    ],
    ids=["memory left", "out of step", "exit afterwards", "exit", "crash"],
)
def test_ranks_that_cannot_go_on_are_told_with_the_reason(
    aftermath: Callable[[str], str | None], script: str, reason: str
) -> None:
    assert reason in (aftermath(script) or "")


def test_a_phase_that_outlasts_its_own_deadline_is_a_timeout_long_before_the_trial_s(outcome: Outcome) -> None:
    failure = outcome('send("phase", phase="engine", seconds=0.3); receive()', seconds=3600)
    assert failure.kind is FailureKind.TIMEOUT
    assert "rank 0 in engine" in failure.message


def test_a_notice_is_passed_on_and_gives_the_ranks_more_time(
    scripted: Callable[[str], LocalLauncher], context: RankContext, tmp_path: Path
) -> None:
    notices: list[str] = []
    script = (
        'receive(); send("notice", text="compiling", seconds=60); import time; time.sleep(1); send("ready"); receive()'
    )
    group = RankGroup(
        scripted(script), stdout=tmp_path / "stdout.log", stderr=tmp_path / "stderr.log", notice=notices.append
    )
    try:
        assert group.setup(context, seconds=0.5) is None
    finally:
        group.kill()
    assert set(notices) == {"compiling"}


def test_events_that_arrive_in_pieces_or_together_are_understood(outcome: Outcome) -> None:
    script = """
import time
fd = int(os.environ["DS_TUNE_EVENT_FD"])
os.write(fd, b'{"event": "ph')
time.sleep(0.1)
os.write(fd, b'ase", "phase": "a"}\\n{"event": "phase", "phase": "b"}\\n{"event": "fin')
time.sleep(0.1)
os.write(fd, b'ished", "curve": {"losses": [5.0], "skipped_steps": 0}}\\n')
"""
    phases: list[str] = []
    assert outcome(script, phases=phases) == curves(5.0, 5.0)
    assert phases == ["a", "b"]


@pytest.mark.parametrize(("usage", "error"), [(True, UsageError), (False, EnvironmentFault)])
def test_a_rank_that_refuses_is_raised_with_its_sentence(
    group: Callable[[str], RankGroup], context: RankContext, usage: bool, error: type[Exception]
) -> None:
    script = f'receive(); send("refused", usage={usage}, message="this cannot be") if rank else receive()'
    with pytest.raises(error, match=r"^this cannot be$"):
        group(script).setup(context)


def test_ranks_that_die_while_they_start_are_a_failure_with_the_log(
    group: Callable[[str], RankGroup], context: RankContext
) -> None:
    failure = group('raise SystemExit("no module named torch")').setup(context)
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.phase, failure.rank) == (FailureKind.CRASH, "start", 0)
    assert "no module named torch" in failure.log_tail


def test_ranks_that_never_get_ready_are_a_timeout(group: Callable[[str], RankGroup], context: RankContext) -> None:
    failure = group("receive(); import time; time.sleep(3600)").setup(context, seconds=1)
    assert isinstance(failure, Failure)
    assert failure.kind == FailureKind.TIMEOUT


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("os._exit(3)", "rank 1 exited with status 3 in warm-up"),
        ("os.kill(os.getpid(), 11)", "rank 1 was killed by SIGSEGV in warm-up"),
        ("os.kill(os.getpid(), 9)", "rank 1 was killed by SIGKILL in warm-up"),
        ("os._exit(0)", "rank 1 exited with status 0 in warm-up"),
    ],
    ids=["exit status", "SIGSEGV", "SIGKILL", "exit without a result"],
)
def test_a_rank_that_dies_is_a_crash_that_says_how_and_its_waiting_peers_are_killed(
    outcome: Outcome, end: str, message: str
) -> None:
    script = (
        f'send("phase", phase="warm-up"); print("last words", file=sys.stderr, flush=True)\nif rank: {end}\nreceive()'
    )
    failure = outcome(script, seconds=3600)  # nobody waits for the peer until then
    assert failure.kind == FailureKind.CRASH
    assert (failure.message, failure.phase, failure.rank) == (message, "warm-up", 1)
    assert "last words" in failure.log_tail


def test_peers_that_see_a_broken_connection_do_not_hide_the_rank_that_ran_out_of_memory(outcome: Outcome) -> None:
    script = """
import time
if rank:
    time.sleep(0.5)  # after its peer, which fails first because of it
    fail("out_of_memory", "no memory", "backward")
else:
    fail("crash", "connection closed by peer", "backward")
"""
    failure = outcome(script)
    assert (failure.kind, failure.rank, failure.peak_memory_bytes) == (FailureKind.OUT_OF_MEMORY, 1, 7)


def test_a_group_that_hangs_is_killed_at_its_deadline_and_says_where_each_rank_stood(outcome: Outcome) -> None:
    script = 'send("phase", phase="engine" if rank else "warm-up"); print("so far", flush=True); receive()'
    failure = outcome(script, seconds=3)
    assert failure.kind == FailureKind.TIMEOUT
    assert failure.message == "not finished after 3 s (rank 0 in warm-up, rank 1 in engine); killed"


def test_a_rank_that_finished_waits_for_its_peer(outcome: Outcome) -> None:
    assert outcome("import time; time.sleep(rank); finish()") == curves(0.0, 1.0)


def test_the_log_s_tail_is_its_end_and_no_more(outcome: Outcome, tmp_path: Path) -> None:
    script = """
log = open(folder + "/stderr.log", "a")
if rank == 0:
    print(*(f"line {number}" for number in range(1000)), sep="\\n", file=log, flush=True)
    os._exit(1)
receive()
"""
    lines = outcome(script).log_tail.splitlines()
    assert lines[-1] == "line 999"
    assert len(lines) == 25


def test_standard_output_is_shown_where_standard_error_says_nothing(outcome: Outcome) -> None:
    script = 'rank or print("only here", file=open(folder + "/stdout.log", "a"), flush=True); os._exit(1)'
    assert outcome(script).log_tail == "only here"


def test_the_last_words_of_a_rank_are_found_behind_the_traceback_of_a_peer_that_lost_it(outcome: Outcome) -> None:
    script = """
import time
log = open(folder + "/stderr.log", "a")
if rank:
    print("terminate called after throwing an instance of 'std::bad_alloc'", file=log, flush=True)
    os.abort()
time.sleep(0.5)
print(*["a line of the traceback"] * 100, sep="\\n", file=log, flush=True)
fail("crash", "Connection closed by peer", "step")
"""
    failure = outcome(script)
    assert (failure.kind, failure.rank) == (FailureKind.OUT_OF_MEMORY, 1)


def test_failure_names_no_phase_of_the_trial_that_the_rank_ran_before(
    group: Callable[[str], RankGroup], context: RankContext, tmp_path: Path
) -> None:
    started = group("""
receive()
send("ready")
receive()
send("phase", phase="timed steps")
finish()
receive()
os._exit(3)
""")
    started.setup(context)
    assert started.run(losses_of(tmp_path), seconds=30, on_phase=lambda phase: None) == curves(0.0, 1.0)
    failure = started.run(losses_of(tmp_path), seconds=30, on_phase=lambda phase: None)
    assert isinstance(failure, Failure)
    assert failure.phase == "start"
