"""What the rows of a comparison train with."""

import dataclasses
from typing import Any

import pytest

from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.tuner.comparison.rows import Row, base_of_row, own_config, workload_of_row

from .conftest import RANKS, config


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, config(0, 4)),
        ({"train_batch_size": 16, "zero_optimization": {"stage": 2}}, config(2, 8)),
        ({"train_batch_size": 16, "gradient_accumulation_steps": 2}, config(0, 4, 2)),
        ({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}, config(0, 2, 4)),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": "auto"}, config(0, 2)),
    ],
)
def test_own_configuration_is_read_as_deepspeed_reads_it(document: dict[str, Any], expected: object) -> None:
    assert own_config(document, RANKS) == expected


def test_own_configuration_without_a_micro_batch_is_no_row() -> None:
    reason = own_config({"train_micro_batch_size_per_gpu": "auto"}, RANKS)
    assert reason == "its file does not say train_micro_batch_size_per_gpu"


def test_tuned_by_hand_keeps_of_the_own_file_only_what_is_trained() -> None:
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3}}
    own = {"optimizer": optimizer, "zero_optimization": {"stage": 2, "overlap_comm": True}}
    workload = HuggingFaceWorkload(model="gpt2-nano", seq_len=32, dtype="fp32", base_ds_config=own)
    assert workload_of_row(Row.HAND_TUNED, workload).base_ds_config == {"optimizer": optimizer}
    assert workload_of_row(Row.CORE, workload).base_ds_config == own


def test_rows_that_train_the_same_with_one_configuration_are_verified_as_one() -> None:
    plain = HuggingFaceWorkload(model="gpt2-nano", seq_len=32, dtype="fp32")
    assert [base_of_row(row, plain) for row in (Row.VANILLA, Row.HAND_TUNED, Row.CORE, Row.SPEED)] == [
        "vanilla", "deepspeed", "deepspeed", "deepspeed",
    ]  # fmt: skip
    own = dataclasses.replace(plain, base_ds_config={"zero_optimization": {"overlap_comm": True}})
    assert base_of_row(Row.HAND_TUNED, own) != base_of_row(Row.CORE, own) == base_of_row(Row.OWN, own)
