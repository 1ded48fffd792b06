"""Scripts that do not train as they stand: what a person is told of the first run, and what is left of it."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.machine import Machine
from ds_tune.objectives.running.deepspeed_objective import DeepSpeedObjective
from ds_tune.objectives.running.launch_line import read_launch_line
from ds_tune.objectives.running.local_launcher import LocalLauncher
from ds_tune.objectives.trial import Failure
from ds_tune.objectives.workload.script import ScriptWorkload
from ds_tune.storage.layout import ResultsFolder
from ds_tune.tuner import first_run

OURS = ("ds_tune", "runpy", "rank/script")


def refusal(line: list[str], launcher: LocalLauncher, machine: Machine, tmp_path: Path) -> str:
    """What the first run of a script is refused with."""
    workload = ScriptWorkload(start=read_launch_line(line)[0])
    with pytest.raises(UsageError) as refused:
        first_run.first_run(
            workload,
            machine,
            lambda machine: contextlib.nullcontext(launcher),  # type: ignore[arg-type, return-value]
            ResultsFolder(tmp_path / "results"),
            lambda text: None,
        )
    return str(refused.value)


@pytest.mark.parametrize(
    ("line", "sentence", "tail"),
    [
        (
            ["broken.py"],
            f"it needs the package no_such_package, which is not installed in {sys.executable}",
            "import no_such_package",
        ),
        (
            ["needs_the_hub.py"],
            "it needs someone/some-model from the hub, which cannot be reached: download it first, or set HF_HOME",
            'from_pretrained("someone/some-model")',
        ),
        (["starts_ranks.py"], "it starts its ranks itself, by spawn: have it train in the process", ""),
        (["starts_ranks.py", "--notebook"], "it starts its ranks itself, by notebook_launcher", ""),
        (["own_loop.py", "--no-such-option"], "it ended with status 2", "unrecognized arguments: --no-such-option"),
    ],
)
def test_script_that_does_not_train_is_refused_with_its_last_words(
    line: list[str], sentence: str, tail: str, launcher: LocalLauncher, script_machine: Machine, folder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    told = refusal(line, launcher, script_machine, tmp_path)
    first, *rest = told.splitlines()
    assert first.startswith(f"{line[0]} does not train as it stands (")
    assert sentence in first
    assert tail in told
    assert not any(ours in text for ours in OURS for text in rest)


def test_script_that_hangs_before_it_trains_is_ended_with_its_last_words(
    launcher: LocalLauncher, script_machine: Machine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_run, "FIRST_RUN_SECONDS", 3.0)
    told = refusal(["hangs.py"], launcher, script_machine, tmp_path)
    assert "hangs.py does not train as it stands (script): it had not taken its first two optimizer steps after" in told
    assert told.endswith("waiting for the data\nwaiting for the data")


def test_nothing_is_left_of_a_rank_that_was_killed(
    objective: Callable[[ScriptWorkload], DeepSpeedObjective], folder: Path, logs: Path
) -> None:
    failure = objective(ScriptWorkload(start=read_launch_line(["killed.py"])[0])).learn(logs)
    assert isinstance(failure, Failure)
    assert "was killed by SIGKILL in script" in failure.message
    written = Path((logs / "stdout.log").read_text().splitlines()[0])
    assert written.is_relative_to(logs / "scratch")
    assert not (logs / "scratch").exists()
    assert not (folder / "out").exists()
