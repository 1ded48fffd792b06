"""The process that has a look at a dataset, and what the tuner learns of it."""

import json
from pathlib import Path

import pytest

from ds_tune.objectives.errors import EnvironmentFault, UsageError
from ds_tune.objectives.running import first_look
from ds_tune.objectives.running.first_look import with_first_look
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

NANO = HuggingFaceWorkload(model="gpt2-nano", seq_len=8, dtype="fp32")


def of(path: Path, row: object) -> HuggingFaceWorkload:
    path.write_text(json.dumps(row) + "\n")
    return HuggingFaceWorkload(model="gpt2-nano", seq_len=8, dtype="fp32", dataset=str(path))


def test_workload_learns_what_of_its_dataset_is_trained_on(tmp_path: Path) -> None:
    said: list[str] = []
    seen = with_first_look(of(tmp_path / "d.jsonl", {"question": "a", "answer": "b"}), said.append)
    assert seen.data_words.startswith("columns question and answer, joined by a blank line; ")
    assert HuggingFaceWorkload.from_json({k: v for k, v in seen.to_json().items() if k != "type"}) == seen


def test_synthetic_tokens_need_no_look() -> None:
    assert with_first_look(NANO, print) is NANO


def test_dataset_that_cannot_be_trained_on_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"column input_ids is a list of lists of integers, and token ids must be"):
        with_first_look(of(tmp_path / "d.jsonl", {"input_ids": [[1]]}), print)


def test_look_that_ends_without_an_answer_is_a_fault_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_look, "LOOK_MODULE", "ds_tune.objectives.rank.no_such_module")
    with pytest.raises(EnvironmentFault, match=r"could not be looked at; what was written last:\n.*no_such_module"):
        with_first_look(of(tmp_path / "d.jsonl", {"text": "a"}), print)
