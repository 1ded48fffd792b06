"""A study of a person's own script, and its result launched by the real launcher."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in (
        "own_loop.py",
        "trainer.py",
        "ds_cpu.json",
        "ds_auto.json",
        "never_deepspeed.py",
        "accelerate.yaml",
        "accelerate_yaml.py",
    ):
        shutil.copy(SCRIPTS / name, folder)
    return folder


def tune(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-P", "-m", "ds_tune.tuner", "--gpus", "0", "--results", str(folder.parent / "results")]
    return subprocess.run([*command, *words], cwd=folder, capture_output=True, text=True, timeout=800, env=environment)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_own_loop_is_tuned_and_the_exported_line_launches_the_winner(
    folder: Path, plain_deepspeed: dict[str, str]
) -> None:
    before = hashes(folder)
    line = ["deepspeed", "--num_gpus", "2", "own_loop.py", "--deepspeed_config", "ds_cpu.json", "--epochs", "1"]
    done = tune(folder, "--trials", "2", "--no-verify", "--", *line)
    assert done.returncode == 0, done.stderr
    assert hashes(folder) == before
    said = " ".join(done.stdout.split())
    assert said.startswith("Running own_loop.py as it stands for two optimizer steps, to learn what it trains …")
    assert "own_loop.py (DeepSpeed), a model of its own fp32, 0.1M parameters; as it stands ZeRO-1, 2 × 4 × 2" in said
    assert "Settings reach it by its DeepSpeed file, --batch-size." in said
    assert "The global batch is held at 16; --free-batch lets it go." in said
    results = folder.parent / "results"
    document = json.loads((results / "summary.json").read_text())
    first, second = document["trials"]
    assert (first["name"], first["source"]) == ("z1_gas4_tmbspg2", "baseline")
    assert second["config"]["micro_batch_size"] * second["config"]["gradient_accumulation_steps"] == 8
    best = document["best"]["config"]
    optimal = json.loads((results / "ds_config_optimal.json").read_text())
    written = json.loads((folder / "ds_cpu.json").read_text())
    assert optimal == {
        **written,
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": best["micro_batch_size"],
        "gradient_accumulation_steps": best["gradient_accumulation_steps"],
        "zero_optimization": {**written["zero_optimization"], "stage": best["zero_stage"]},
    }
    again = tune(folder, "--trials", "2", "--no-verify", "--", *line)
    assert again.returncode == 0, again.stderr
    assert "Running own_loop.py as it stands" not in again.stdout  # what it showed is remembered
    assert json.loads((results / "summary.json").read_text())["best"] == document["best"]
    command = (results / "cmd_optimal.txt").read_text()
    words = shlex.split(command)
    assert words[words.index("deepspeed") :][:4] == ["deepspeed", "--num_gpus", "2", str(folder / "own_loop.py")]
    launched = subprocess.run(
        [sys.executable, "-P", "-m", "ds_tune.tuner", "run", "--results", str(results)],
        cwd=folder.parent, capture_output=True, text=True, timeout=600,
        env={**os.environ, **plain_deepspeed},
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    assert "epoch 0: loss " in launched.stdout
    assert (folder / "checkpoint.pt").exists()  # now it is for real


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_is_recognised_is_explained_without_a_trial(folder: Path) -> None:
    done = tune(folder, "--explain", "--", "trainer.py", "--deepspeed", "ds_auto.json", "--output_dir", "out")
    assert done.returncode == 0, done.stderr
    assert "trainer.py (Trainer), gpt2 fp32" in done.stdout
    assert "as it stands ZeRO-2, 8 × 1 × 2 = 16 samples a step" in done.stdout
    assert not (folder.parent / "results").exists()
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--"], "nothing comes behind --"),
        (["--", "nothere.py"], "nothere.py: there is no such training script"),
        (["--model", "gpt2", "--", "own_loop.py"], "--model: the training script behind -- says that itself"),
        (
            ["--map", "stage=--zero", "--", "own_loop.py"],
            "--map stage=--zero: write KEY=OPTION, with KEY",
        ),
        (["--map", "zero_optimization.stage=--zero"], "--map is about a training script"),
        (["--free-batch"], "--free-batch is about a training script"),
        (["--explain"], "--explain is about a training script"),
        (["--free-batch", "--global-batch", "8", "--", "own_loop.py"], "--free-batch does not go with --global-batch"),
    ],
)
def test_contradictions_are_refused_in_a_sentence(words: list[str], sentence: str, folder: Path) -> None:
    done = tune(folder, *words)
    assert done.returncode == 2
    assert done.stderr.startswith("ds-tune: ")
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_yaml_of_accelerate_follows_the_winner(folder: Path) -> None:
    before = hashes(folder)
    line = ["accelerate", "launch", "--config_file", "accelerate.yaml", "accelerate_yaml.py"]
    done = tune(folder, "--trials", "2", "--no-verify", "--", *line)
    assert done.returncode == 0, done.stderr
    assert hashes(folder) == before
    results = folder.parent / "results"
    first, second = json.loads((results / "summary.json").read_text())["trials"]
    assert (first["name"], second["state"]) == ("z1_gas2_tmbspg2", "complete")
    best = json.loads((results / "summary.json").read_text())["best"]["config"]
    written = yaml.safe_load((results / "accelerate_optimal.yaml").read_text())
    own = yaml.safe_load((folder / "accelerate.yaml").read_text())
    changed = {key: best[key] for key in ("zero_stage", "gradient_accumulation_steps")}
    assert written == {**own, "deepspeed_config": {**own["deepspeed_config"], **changed}}
    words = shlex.split((results / "cmd_optimal.txt").read_text())
    assert words[words.index("accelerate") :] == [
        *line[:3], str(results / "accelerate_optimal.yaml"), str(folder / "accelerate_yaml.py"),
        "--per_device_train_batch_size", str(best["micro_batch_size"]),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_script_that_does_not_train_ends_with_its_reason_and_status_2(folder: Path) -> None:
    done = tune(folder, "--", "never_deepspeed.py")
    assert done.returncode == 2
    assert "never_deepspeed.py does not train as it stands" in done.stderr
    assert "it never calls deepspeed.initialize" in done.stderr
    assert not (folder.parent / "results" / "study.db").exists()
