"""Spaces of which nothing is predicted to fit: what saves memory is added, and said."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_tune.tuner.cli import main

LLAMA_8B = str(Path(__file__).parent / "models" / "llama-8b.json")
LONG = ["--model", LLAMA_8B, "--seq-len", "8192", "--dtype", "bf16"]
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def command(*words: str) -> tuple[int, str]:
        status = main(list(words))
        return status, capsys.readouterr().out

    return command


@pytest.mark.parametrize(
    ("hardware", "added"),
    [
        ("8xH100-80GB", "activation checkpointing is searched, too."),
        ("2xH100-80GB", "the optimizer on the host is searched, too, which takes about 120 GiB of the host's memory."),
        ("1xH100-80GB", "activation checkpointing and the optimizer on the host are searched, too, which"),
        ("4xA10", "activation checkpointing, the optimizer on the host and ZeRO-3's parameters on the host are"),
    ],
)
def test_what_saves_memory_is_added_by_itself_and_said(run: Run, hardware: str, added: str) -> None:
    status, said = run("plan", "--hardware", hardware, *LONG)
    assert status == 0
    assert f"Nothing of what was asked for is predicted to fit: {added}" in said
    _, document = run("plan", "--hardware", hardware, *LONG, "--json")
    assert added in json.loads(document)["added"]


def test_a_study_finds_the_answer_and_goes_on_with_the_same_command(run: Run) -> None:
    words = ["--simulate", "--hardware", "8xH100-80GB", *LONG]
    status, said = run(*words, "--trials", "2")
    assert status == 0
    assert said.count("activation checkpointing is searched, too") == 1
    assert re.search(r"#0 +z\d_ac1_gas\d+_tmbspg1 .* complete, simulated", said)
    status, said = run(*words, "--trials", "3")
    assert status == 0 and "trial 3/3" in said


def test_nothing_is_added_where_something_fits(run: Run) -> None:
    status, document = run("plan", "--hardware", "8xH100-80GB", *LONG, "--seq-len", "1024", "--json")
    assert status == 0 and json.loads(document)["added"] is None


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--hardware", "1xT4", "--seq-len", "2048"], "With all that saves memory it would take 2 such GPUs."),
        (["--hardware", "1xT4", "--seq-len", "8192"], "One sample of this length is too much for one of them"),
    ],
)
def test_nothing_fits_says_what_it_would_take(run: Run, words: list[str], hint: str) -> None:
    status, said = run("plan", *words, "--model", LLAMA_8B)
    assert status == 3
    assert f"Nothing is predicted to fit, not even one sample a rank. {hint}" in said


def test_the_named_number_of_gpus_is_enough(run: Run) -> None:
    for count, expected in ((1, 3), (2, 0)):
        words = ["--hardware", f"{count}xT4", "--seq-len", "2048", "--model", LLAMA_8B]
        assert run("plan", *words)[0] == expected


def test_a_space_file_is_kept_and_the_hint_says_what_to_list(run: Run, tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_text("[search]\nzero_stage = [2, 3]\nmicro_batch_size = [1]\n")
    status, said = run("plan", "--hardware", "8xH100-80GB", *LONG, "--space", "space.toml")
    assert status == 3
    assert "With activation checkpointing something is predicted to; list that, too." in said
