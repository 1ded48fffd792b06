"""bin/environment.sh: which Python runs ds-tune, and which torch a machine gets; nothing is downloaded."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
TOOLS = ["awk", "cat", "cksum", "cp", "dirname", "grep", "ln", "mkdir", "readlink", "rm", "sh", "sleep", "sort"]

# Answers -c like a real Python; notes what venv, pip and -m are asked to do instead of doing it.
FAKE_PYTHON = f"""#!/bin/sh
case "$1 $2" in
    "-c "*) exec "{sys.executable}" "$@" ;;
    "-V ") echo "Python 3.11.0"; exit ;;
    "-P -c") [ -n "${{INSTALLED:-}}" ]; exit ;;
    "-m venv") mkdir -p "$5/bin"; cp "$0" "$5/bin/python"; cp "$0" "$5/bin/mypy" ;;
    "-m pip") sleep 0.3 ;;
esac
echo "$(pwd): $*" >>"$NOTES"
[ "$3" != install ] || exit "${{PIP_STATUS:-0}}"
"""


@dataclass
class Machine:
    """A checkout with the real bin/, and a PATH that holds the basic tools and what a test adds."""

    checkout: Path
    path: Path
    notes: Path

    def add(self, name: str, script: str) -> None:
        """Put an executable on the PATH."""
        (self.path / name).write_text(script)
        (self.path / name).chmod(0o755)

    def start(self, *argv: str | Path, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            argv,
            env={"PATH": str(self.path), "NOTES": str(self.notes), **environment},
            cwd=self.checkout.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *argv: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*argv, **environment)
        stdout, stderr = process.communicate()
        return subprocess.CompletedProcess(argv, process.returncode, stdout, stderr)

    def call(self, function: str) -> subprocess.CompletedProcess[str]:
        """Call one function of environment.sh as bin/tune would."""
        return self.run("sh", "-euc", f'checkout=$1; . "$1/bin/environment.sh"; {function}', "sh", self.checkout)

    def noted(self, what: str) -> list[str]:
        """The lines of the notes that contain `what`, since the last call."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        self.notes.unlink(missing_ok=True)
        return [line for line in lines if what in line]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    checkout, path = tmp_path / "check out", tmp_path / "path"
    shutil.copytree(CHECKOUT / "bin", checkout / "bin")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(CHECKOUT / name, checkout)
    path.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found, tool
        (path / tool).symlink_to(found)
    return Machine(checkout, path, tmp_path / "notes")


@pytest.mark.parametrize(
    ("nvidia_smi", "torch"),
    [
        pytest.param(None, "2.13.0", id="no nvidia-smi"),
        pytest.param("echo 'NVIDIA-SMI has failed'; exit 9", "2.13.0", id="nvidia-smi fails"),
        pytest.param("echo 'No devices were found'", "2.13.0", id="no GPU"),
        pytest.param("echo '7.0, 580.65.06'", "2.10.0", id="V100"),
        pytest.param("echo '9.0, 580.65.06'; echo '7.0, 580.65.06'", "2.10.0", id="H100 and V100"),
        pytest.param("echo '9.0, 580.65.06'; echo '9.0, 580.65.06'", "2.13.0", id="two H200"),
        pytest.param("echo '9.0, 550.54.15'", "2.10.0", id="H100 with an old driver"),
        pytest.param("echo '7.5, 580.65.06'", "2.13.0", id="T4"),
        pytest.param("echo '12.0, 1000.1'", "2.13.0", id="numbers, not strings, are compared"),
    ],
)
def test_torch_fits_oldest_gpu_and_driver(machine: Machine, nvidia_smi: str | None, torch: str) -> None:
    if nvidia_smi:
        machine.add("nvidia-smi", f"#!/bin/sh\n{nvidia_smi}\n")
    assert machine.call("torch_version").stdout == f"{torch}\n"


def test_a_python_that_does_not_run_is_skipped(machine: Machine) -> None:
    machine.add("python3", "#!/bin/sh\necho 'pyenv: python3: command not found' >&2\nexit 127\n")
    machine.add("python3.12", FAKE_PYTHON)
    result = machine.call("find_python")
    assert (result.stdout, result.stderr) == ("python3.12\n", "")


def test_no_python_is_a_sentence_and_exit_code_2(machine: Machine) -> None:
    result = machine.run(machine.checkout / "bin/tune")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("ds-tune: found no Python 3.11 or newer")
    assert "python3-venv" in result.stderr


def test_the_environment_is_set_up_once_and_again_when_its_inputs_change(machine: Machine) -> None:
    machine.add("python3", FAKE_PYTHON)
    tune = machine.checkout / "bin/tune"

    first = machine.run(tune)
    assert (first.returncode, first.stdout) == (0, "")
    assert "setting up" in first.stderr
    [install] = machine.noted("-m pip install")
    assert install == f"{machine.checkout}: -m pip install -c constraints.txt torch==2.13.0 -e ."

    second = machine.run(tune)
    assert (second.returncode, second.stderr) == (0, "")
    assert machine.noted("-m pip") == []

    with (machine.checkout / "constraints.txt").open("a") as constraints:
        constraints.write("rich==0\n")
    machine.run(tune)
    assert len(machine.noted("-m pip install")) == 1


def test_the_environment_of_the_tests_is_good_for_tune_but_not_the_reverse(machine: Machine) -> None:
    machine.add("python3", FAKE_PYTHON)
    machine.run(machine.checkout / "bin/tune")
    machine.noted("")
    machine.run(machine.checkout / "bin/test")
    [install] = machine.noted("-m pip install")
    assert install.endswith("-e .[test]")
    machine.run(machine.checkout / "bin/tune")
    assert machine.noted("-m pip") == []


def test_a_failed_installation_names_its_log_and_is_tried_again(machine: Machine) -> None:
    machine.add("python3", FAKE_PYTHON)
    failed = machine.run(machine.checkout / "bin/tune", PIP_STATUS="1")
    assert (failed.returncode, failed.stdout) == (1, "")
    log = machine.checkout / ".venv/setup.log"
    assert f"installing failed, see {log}" in failed.stderr
    assert log.exists()
    assert machine.run(machine.checkout / "bin/tune").returncode == 0
    assert len(machine.noted("-m venv")) == 1


def test_two_starts_at_once_set_up_once(machine: Machine) -> None:
    machine.add("python3", FAKE_PYTHON)
    starts = [machine.start(machine.checkout / "bin/tune") for _ in range(2)]
    said = [start.communicate()[1] for start in starts]
    assert [start.returncode for start in starts] == [0, 0]
    assert len(machine.noted("-m pip install")) == 1
    assert sum("waiting for the set-up" in stderr for stderr in said) == 1


def test_an_environment_with_ds_tune_is_used_as_it_is(machine: Machine) -> None:
    machine.add("python3", FAKE_PYTHON)
    machine.add("ds-tune", "#!/bin/sh\n")
    machine.run(machine.checkout / "bin/tune", INSTALLED="yes")
    assert machine.noted("") == [f"{machine.checkout.parent}: -P -m ds_tune.tuner"]
    assert not (machine.checkout / ".venv").exists()


def test_tune_keeps_the_current_directory_and_the_arguments_through_a_symlink(machine: Machine) -> None:
    machine.add("python3", FAKE_PYTHON)
    link = machine.path / "tune"
    link.symlink_to(machine.checkout / "bin/tune")
    assert machine.run(link, "--trials", "9", os.curdir).returncode == 0
    assert machine.noted("-m ds_tune.tuner") == [f"{machine.checkout.parent}: -P -m ds_tune.tuner --trials 9 ."]


def test_tests_run_in_the_root_of_the_checkout(machine: Machine) -> None:
    machine.add("python3", FAKE_PYTHON)
    machine.run(machine.checkout / "bin/test", "-k", "pin")
    [noted] = machine.noted("-m pytest")
    assert noted.startswith(f"{machine.checkout}: -m pytest ") and noted.endswith(" -k pin")


def test_types_are_checked_by_the_active_mypy_or_else_that_of_the_checkout(machine: Machine) -> None:
    (machine.checkout / ".ci").mkdir()
    types = Path(shutil.copy(CHECKOUT / ".ci/types", machine.checkout / ".ci/types"))
    machine.add("python3", FAKE_PYTHON)
    assert machine.run(types, "--pretty").returncode == 0
    notes = machine.noted("")
    assert any(line.endswith("-e .[test]") for line in notes)
    assert notes[-1] == f"{machine.checkout}: --pretty"
    machine.add("mypy", "#!/bin/sh\nexit 7\n")
    assert machine.run(types).returncode == 7
    assert machine.noted("") == []
