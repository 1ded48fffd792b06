"""Knobs of the model as words of a command line, the way `cmd_optimal.txt` has them."""

import pytest

from ds_tune.objectives.rank.knobs import parse_knobs
from ds_tune.objectives.trial import TrialConfig


def test_the_model_s_knobs_are_read_as_a_command_line_has_them() -> None:
    config = TrialConfig(
        zero_stage=0, micro_batch_size=1, gradient_accumulation_steps=1,
        activation_checkpointing=2, compile="blocks", padded_vocabulary=64, attention="eager", dropout="none",
    )  # fmt: skip
    words = [f"{field}={value}" for field, value in config.model_knobs.items()]
    assert parse_knobs(words) == config.model_knobs
    assert parse_knobs([]) == {}


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("nonsense=1", "nonsense=1: the model's knobs are activation_checkpointing, compile, "),
        ("overlap_comm=on", "overlap_comm=on: the model's knobs are "),
        ("compile", "compile: compile is one of blocks, model, deepcompile"),
        ("compile=everything", "compile is one of blocks, model, deepcompile"),
        ("activation_checkpointing=all", "activation_checkpointing takes a whole number"),
        ("padded_vocabulary=-64", "padded_vocabulary takes a whole number"),
    ],
)
def test_a_knob_that_there_is_not_is_told_in_one_sentence(word: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as raised:
        parse_knobs([word])
    assert "\n" not in str(raised.value)
