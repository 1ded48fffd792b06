"""The person's folder, ranks that run scripts in it, and a look at what they leave."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.running import local_launcher
from ds_tune.objectives.running.deepspeed_objective import DeepSpeedObjective
from ds_tune.objectives.running.local_launcher import LocalLauncher, LocalRankProcesses
from ds_tune.objectives.timing.step_plan import StepPlan
from ds_tune.objectives.workload.script import ScriptWorkload

SCRIPTS = Path(__file__).parents[3] / "scripts"
QUICK = StepPlan(warmup_steps=1, zero3_extra_warmup_steps=0, min_timed_steps=2, max_timed_steps=2)
MACHINE = Machine(device="cpu", name="the test machine", ranks=2, memory_bytes=8 * GIB)

Objective = Callable[[ScriptWorkload], DeepSpeedObjective]


class OneForkServer(LocalLauncher):
    """A launcher whose fork server serves all tests of a file: imports are paid for once."""

    def launch(self, *, stdout: Path, stderr: Path) -> LocalRankProcesses:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("PYTEST_CURRENT_TEST", raising=False)  # else each test has an environment of its own
            return super().launch(stdout=stdout, stderr=stderr)


@pytest.fixture(scope="module")
def launcher() -> Iterator[LocalLauncher]:
    """One for all tests of a file."""
    with OneForkServer(MACHINE, worker="ds_tune.objectives.rank.script.worker") as launcher:
        yield launcher


@pytest.fixture(autouse=True)
def nothing_is_left(launcher: LocalLauncher) -> Iterator[None]:
    """Fails a test that leaves a process behind, beside the fork server and its guard."""
    yield
    deadline = time.monotonic() + 5
    while (left := ranks()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def ranks() -> list[psutil.Process]:
    """Processes that the fork server has forked and that still run."""
    children = psutil.Process().children()
    servers = [child for child in children if local_launcher.FORK_SERVER_MODULE in child.cmdline()]
    forked = [process for server in servers for process in server.children(recursive=True)]
    return [process for process in forked if process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The person's folder."""
    folder = tmp_path / "mine"
    shutil.copytree(SCRIPTS, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def notices() -> list[str]:
    """Lines that ranks have for the person."""
    return []


@pytest.fixture
def objective(launcher: LocalLauncher, tmp_path: Path, notices: list[str]) -> Iterator[Objective]:
    made: list[DeepSpeedObjective] = []

    def make(workload: ScriptWorkload) -> DeepSpeedObjective:
        made.append(
            DeepSpeedObjective(
                workload,
                MACHINE,
                launcher=launcher,
                log_folder=tmp_path / "logs",
                trial_seconds=300.0,
                plan=QUICK,
                fresh_ranks=True,
                notice=notices.append,
            )
        )
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def script_machine() -> Machine:
    return MACHINE


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    (tmp_path / "trial").mkdir()
    return tmp_path / "trial"
