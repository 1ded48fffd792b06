"""What the rows of a comparison train with."""

import dataclasses

from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.tuner.comparison.rows import Row, base_of_row, workload_of_row


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
