"""Who comes from `deepspeed --autotuning` has told it things that ds-tune takes over."""

import dataclasses
from typing import Any

import pytest

from ds_tune.objectives.errors import UsageError
from ds_tune.tuner.autotuning_block import with_autotuning_block
from ds_tune.tuner.request import TuneRequest

REQUEST = TuneRequest(script=("train.py",))
BLOCK = {
    "enabled": True,
    "arg_mappings": {
        "train_micro_batch_size_per_gpu": "--per_device_train_batch_size",
        "gradient_accumulation_steps": "gradient_accumulation_steps",
        "zero_optimization.overlap_comm": "--overlap",
    },
    "max_train_micro_batch_size_per_gpu": 32,
    "max_train_batch_size": 256,
    "tuner_num_trials": 20,
}


def test_mappings_and_limits_are_taken_over() -> None:
    request, lines = with_autotuning_block(REQUEST, BLOCK)
    assert request.mapped == {
        "train_micro_batch_size_per_gpu": "--per_device_train_batch_size",
        "gradient_accumulation_steps": "--gradient_accumulation_steps",
    }
    assert (request.max_micro_batch, request.max_global_batch) == (32, 256)
    assert lines == [
        "Taken from the autotuning block: arg_mappings, max_train_micro_batch_size_per_gpu, max_train_batch_size.",
        "Not taken from the autotuning block: tuner_num_trials (`trials`).",
    ]


def test_what_was_asked_for_goes_before_the_block() -> None:
    asked = dataclasses.replace(
        REQUEST, map=("train_micro_batch_size_per_gpu=--rows",), max_micro_batch=8, global_batch=16
    )
    request, _ = with_autotuning_block(asked, BLOCK)
    assert request.mapped["train_micro_batch_size_per_gpu"] == "--rows"
    assert (request.max_micro_batch, request.max_global_batch, request.global_batch) == (8, None, 16)


@pytest.mark.parametrize("block", [None, "auto", {}, {"enabled": True, "fast": False}])
def test_block_that_says_nothing_changes_nothing(block: Any) -> None:
    assert with_autotuning_block(REQUEST, block) == (REQUEST, [])


@pytest.mark.parametrize(
    "block", [{"arg_mappings": ["--x"]}, {"max_train_batch_size": "many"}, {"max_train_batch_size": 0}]
)
def test_values_that_cannot_be_are_refused(block: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="of the DeepSpeed configuration must be"):
        with_autotuning_block(REQUEST, block)
