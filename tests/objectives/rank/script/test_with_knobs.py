"""A script that is launched with knobs laid on its model."""

import subprocess
import sys
from pathlib import Path

import pytest

from ds_tune.objectives.rank.script.with_knobs import main

SCRIPTS = Path(__file__).parents[3] / "scripts"
MODULE = "ds_tune.objectives.rank.script.with_knobs"


@pytest.mark.parametrize("as_module", [False, True])
def test_launchers_run_it_in_the_place_of_the_script(
    as_module: bool, tmp_path: Path, plain_deepspeed: dict[str, str]
) -> None:
    program = ["--module", "sub.shows_model"] if as_module else ["sub/shows_model.py"]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/neighbour.py").write_text("")
    script = (SCRIPTS / "shows_model.py").read_text()
    neighbour = "import sub.neighbour" if as_module else "import neighbour"
    (tmp_path / "sub/shows_model.py").write_text(f"{neighbour}\n{script}")
    (tmp_path / "torch.py").write_text("raise SystemExit('not this one')")
    launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "-m"]
    knobs = ["--knob", "padded_vocabulary=96", "--knob", "activation_checkpointing=1"]
    done = subprocess.run(
        [*launcher, MODULE, *knobs, *program, "--steps", "2"],
        cwd=tmp_path,
        env={"DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONSAFEPATH": "1"}
        | python_path()
        | plain_deepspeed,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "PaddedLinear 96, blocks checkpointed: [True, True], 2 steps" in done.stdout, done.stderr


def python_path() -> dict[str, str]:
    """Where ds_tune is imported from."""
    return {"PYTHONPATH": ":".join(path for path in sys.path if path and "tests" not in path)}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--knob", "compile=blocks"], "name the script behind the knobs"),
        (["--knob", "compile=all", "x.py"], "--knob compile=all: compile is one of"),
        (["--knob", "zero_stage=1", "x.py"], "--knob zero_stage=1: the model's knobs are"),
    ],
)
def test_what_it_cannot_do_is_said(words: list[str], sentence: str) -> None:
    with pytest.raises(SystemExit, match=sentence):
        main(words)
