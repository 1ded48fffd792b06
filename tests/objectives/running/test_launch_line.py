"""Launch lines as people type them, and what the real launchers make of them."""

import shutil
import sys
from pathlib import Path

import pytest

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.running.launch_line import read_launch_line

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("own_loop.py", "ds_cpu.json"):
        shutil.copy(SCRIPTS / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_SIZE", "2")
    monkeypatch.setenv("RANK", "0")  # left by a launcher around the shell: no rank of this line
    monkeypatch.setenv("WORLD_SIZE", "1")
    return tmp_path


@pytest.mark.parametrize("front", [[], ["python"], ["python3.11", "-u"], [sys.executable]])
def test_script_without_a_launcher_is_read_as_it_stands(front: list[str], folder: Path) -> None:
    start, ranks = read_launch_line([*front, "own_loop.py", "--epochs", "2"])
    assert ranks is None
    assert (start.program, start.arguments) == (str(folder / "own_loop.py"), ("--epochs", "2"))
    assert (start.is_module, start.launcher, start.folder) == (False, (), str(folder))


def test_module_without_a_launcher_is_read_as_it_stands() -> None:
    start, ranks = read_launch_line(["python", "-m", "package.train", "--epochs", "2"])
    assert (start.program, start.is_module, start.arguments, ranks) == ("package.train", True, ("--epochs", "2"), None)


LAUNCHERS = {
    "deepspeed": ["deepspeed", "--num_gpus", "2"],
    "torchrun": ["torchrun", "--standalone", "--nproc_per_node=2"],
    "accelerate": ["accelerate", "launch", "--num_processes", "2", "--use_deepspeed", "--zero_stage", "2"],
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_is_asked_what_it_hands_its_ranks(name: str, folder: Path) -> None:
    line = [*LAUNCHERS[name], "own_loop.py", "--deepspeed_config", "ds_cpu.json"]
    start, ranks = read_launch_line(line)
    assert ranks == 2
    assert (start.program, start.folder) == (str(folder / "own_loop.py"), str(folder))
    assert start.arguments == ("--deepspeed_config", "ds_cpu.json")
    assert list(start.launcher) == LAUNCHERS[name]
    assert start.local_rank_flag == ("--local_rank" if name == "deepspeed" else None)
    assert (start.environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "2") == (name == "accelerate")
    assert not {"RANK", "MASTER_PORT", "PYTHONPATH"} & set(start.environment)
    assert not any(variable.startswith("TORCHELASTIC") for variable in start.environment)
    assert {path.name for path in folder.iterdir()} == {"own_loop.py", "ds_cpu.json"}


def test_gpus_chosen_by_a_launcher_are_to_be_chosen_for_ds_tune_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_SIZE", "4")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UsageError, match="write CUDA_VISIBLE_DEVICES=2,3 in front of the command"):
        read_launch_line(["deepspeed", "--include", "localhost:2,3", "own_loop.py"])


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (["nothere.py"], "nothere.py: there is no such training script"),
        (["python"], "names no training script"),
        (["--epochs", "3"], "names no training script"),
        (["torchrun", "--nproc_per_node=2", "nothere.py"], "nothere.py: there is no such training script"),
        (["torchrun", "--no-such-option", "own_loop.py"], "torchrun started no rank of a script: "),
        (["torchrun", "--nnodes", "2", "own_loop.py"], "for 2 machines (--nnodes): ds-tune tunes on one"),
        (["deepspeed", "--num_nodes=2", "own_loop.py"], "for 2 machines (--num_nodes): ds-tune tunes on one"),
        (["bash", "run.sh"], "bash is no launcher that ds-tune knows"),
        (["FOO=1", "python", "own_loop.py"], "FOO=1 is no launcher that ds-tune knows"),
    ],
)
def test_line_that_starts_no_script_is_refused_in_a_sentence(line: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        read_launch_line(line)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_launcher_of_one_process_starts_the_script_without_a_rank_and_nothing_of_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "writes.py").write_text("import pathlib; pathlib.Path('I_RAN').touch()")
    start, ranks = read_launch_line(["accelerate", "launch", "--cpu", "--num_processes", "1", "writes.py", "--x", "1"])
    assert (Path(start.program), start.arguments, ranks) == (tmp_path / "writes.py", ("--x", "1"), 1)
    assert not (tmp_path / "I_RAN").exists()
