"""What scripts write, send and track besides their training, tried for real against a hub that counts."""

import hashlib
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.machine import Machine
from ds_tune.objectives.running.deepspeed_objective import DeepSpeedObjective
from ds_tune.objectives.running.early_environment import early_environment
from ds_tune.objectives.running.launch_line import read_launch_line
from ds_tune.objectives.running.local_launcher import LocalLauncher
from ds_tune.objectives.timing.step_plan import StepPlan
from ds_tune.objectives.trial import Measurement, TrialConfig
from ds_tune.objectives.workload.script import ScriptWorkload
from ds_tune.objectives.workload.script_facts import ScriptFacts


class Hub(http.server.ThreadingHTTPServer):
    """Answers nothing that is of use, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), Asked)


class Asked(http.server.BaseHTTPRequestHandler):
    def answer(self) -> None:
        assert isinstance(self.server, Hub)
        self.server.asked.append(f"{self.command} {self.path}")
        self.send_error(404)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = answer

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        monkeypatch.setenv("THE_HUB", f"http://127.0.0.1:{hub.server_address[1]}")
        yield hub
        hub.shutdown()


def contents(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_nothing_is_uploaded_tracked_or_saved_and_the_script_goes_on(
    hub: Hub, folder: Path, logs: Path, script_machine: Machine, tmp_path: Path
) -> None:
    before = contents(folder)
    start, _ = read_launch_line(["uploads.py"])
    early = early_environment(start)
    assert early == {"HF_ENDPOINT": os.environ["THE_HUB"], "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_invented"}
    with LocalLauncher(script_machine, worker="ds_tune.objectives.rank.script.worker", environment=early) as launcher:
        outcomes = []
        facts = None
        for _ in range(2):
            objective = DeepSpeedObjective(
                ScriptWorkload(start=start, facts=facts), script_machine, launcher=launcher, log_folder=logs,
                trial_seconds=200.0, fresh_ranks=True,
                plan=StepPlan(warmup_steps=1, min_timed_steps=2, max_timed_steps=2),
            )  # fmt: skip
            try:
                if facts is None:
                    facts = objective.learn(logs)
                    assert isinstance(facts, ScriptFacts), facts
                else:
                    config = TrialConfig(zero_stage=0, micro_batch_size=4, gradient_accumulation_steps=1)
                    outcomes.append(objective.run(config, logs, lambda phase: None))
            finally:
                objective.close()
    assert isinstance(outcomes[0], Measurement), outcomes
    assert "commit 0000" in (logs / "stdout.log").read_text()
    assert contents(folder) == before
    assert [path.name for path in logs.iterdir() if path.suffix != ".log"] == []
    assert hub.asked == []


def write(folder: Path, text: str) -> list[str]:
    (folder / "train.py").write_text(text)
    return [str(folder / "train.py"), "--option"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import os\nos.environ['HF_HOME'] = '/a' + '/b'\nimport transformers\n", {"HF_HOME": "/a/b"}),
        ("import os, sys\nos.environ.setdefault('HF_HOME', sys.argv[1])\nimport torch\n", {"HF_HOME": "--option"}),
        ("import os\nimport torch\nos.environ['A'] = '1'\nimport datasets\nos.environ['B'] = '2'\n", {"A": "1"}),
        ("import os\nos.environ['RANK_'] = os.environ['RANK']\nimport deepspeed\n", {"RANK_": "0"}),
        ("import os\nimport torch\nos.environ['A'] = '1'\nopen('trained', 'w')\n", {}),
        ("import os\nos.environ['A'] = '1'\nraise ValueError\nimport torch\n", {}),
        ("import os\nprint(os.environ)\nopen('trained', 'w')\n", {}),
    ],
)
def test_variables_set_above_the_imports_are_found_without_training(
    text: str, found: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HOME")
    monkeypatch.chdir(tmp_path)
    assert early_environment(read_launch_line(write(tmp_path, text))[0]) == found
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]


def test_script_that_chooses_gpus_is_refused(tmp_path: Path) -> None:
    line = write(tmp_path, "import os\nos.environ['CUDA_VISIBLE_DEVICES'] = '1'\nimport torch\n")
    with pytest.raises(UsageError, match=r"train\.py sets CUDA_VISIBLE_DEVICES=1: write that in front of bin/tune"):
        early_environment(read_launch_line(line)[0])
