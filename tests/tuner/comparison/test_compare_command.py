"""The command `compare` for real: every row trains on two CPU ranks, also after the command was ended in its middle."""

import csv
import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ..conftest import NO_WIDTH, TUNER

CHECKOUT = Path(__file__).parents[3]
Finished = subprocess.CompletedProcess[str]
OPTIONS = (
    "compare", "--gpus", "0", "--models", "gpt2-nano", "--seq-len", "32", "--max-micro-batch", "2",
    "--max-global-batch", "8", "--trials", "2", "--speed-trials", "1", "--rounds", "1", "--no-verify", "--free-only",
    "--ds-config", "ds.json", "--results", "compared",
)  # fmt: skip


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Finished]:
    def run(*arguments: str) -> Finished:
        return subprocess.run(
            [*TUNER, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=500, env=NO_WIDTH
        )

    return run


def end_after_first_run(folder: Path) -> None:
    """Ends the command by SIGTERM when it has written down its first run."""
    with subprocess.Popen([*TUNER, *OPTIONS], cwd=folder, stdout=subprocess.PIPE, text=True, env=NO_WIDTH) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "gas1_tmbspg1: " in line:
                process.send_signal(signal.SIGTERM)
                break
        process.stdout.read()
        assert process.wait() == 130


@pytest.mark.slow
@pytest.mark.timeout(600)  # a minute on two idle cores, four beside other work
def test_every_row_is_tuned_verified_and_written_also_where_the_command_was_ended_in_between(
    command: Callable[..., Finished], tmp_path: Path
) -> None:
    own = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2, "zero_optimization": {"stage": 1}}
    (tmp_path / "ds.json").write_text(json.dumps(own))
    folder = tmp_path / "compared"
    end_after_first_run(tmp_path)
    first = json.loads((folder / "runs.json").read_text())["models"]["gpt2-nano"]["swept"]["vanilla"]
    assert not json.loads((folder / "comparison.json").read_text())["complete"]
    done = command(*OPTIONS)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = (folder / "runs.json").read_text()
    assert first.items() <= json.loads(runs)["models"]["gpt2-nano"]["swept"]["vanilla"].items()
    document: dict[str, Any] = json.loads((folder / "comparison.json").read_text())
    jsonschema.validate(document, json.loads((CHECKOUT / "tuner/comparison/comparison.schema.json").read_text()))
    assert document["complete"]
    rows = {row["row"]: row for row in document["rows"]}
    assert list(rows) == ["vanilla", "hand_tuned", "own", "core", "speed"]
    for row in rows.values():
        assert (row["runnable"], row["reason"], row["runs"]) == (True, None, 1)
        assert row["samples_per_second"] > 0 and row["peak_memory_bytes"] > 100 * 2**20
        low, high = row["over_vanilla"]["ci95"]
        assert low <= row["over_vanilla"]["factor"] <= high
    assert {name: row["experiments"] for name, row in rows.items()} == {
        "vanilla": 2, "hand_tuned": 8, "own": 1, "core": 2, "speed": 1,
    }  # fmt: skip
    assert rows["own"]["config"] == {"zero_stage": 1, "micro_batch_size": 1, "gradient_accumulation_steps": 2}
    assert rows["hand_tuned"]["config"]["gradient_accumulation_steps"] == 1
    assert len(list(csv.DictReader((folder / "comparison.csv").open()))) == len(rows)
    assert "| Model name" in (folder / "comparison.md").read_text()
    assert (folder / "gpt2-nano" / "core" / "ds_config_optimal.json").exists()

    again = command(*OPTIONS, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["rows"] == document["rows"]
    assert (folder / "runs.json").read_text() == runs


def test_what_cannot_be_compared_is_refused_in_a_sentence(command: Callable[..., Finished], tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.json").write_text("{}")
    cases = [
        (
            ("--results", "study"),
            "--results study holds the results of a study; give the comparison a folder of its own",
        ),
        (("--models", "gpt2-nano", "gpt2-nano"), "a model is named twice; name each once"),
        (("--global-batch", "3"), "--global-batch 3 must be a multiple of the 2 ranks"),
    ]
    for words, sentence in cases:
        refused = command("compare", "--gpus", "0", "--seq-len", "32", *words)
        assert (refused.returncode, refused.stderr.strip()) == (2, f"ds-tune: {sentence}")
