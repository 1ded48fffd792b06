"""Sizes that no model can have are found in the configuration, and what transformers can build is never refused."""

from typing import Any

import pytest

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.workload.model_sizes import check_sizes

WIDTH_8 = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 16}


def build(document: dict[str, Any]) -> None:
    """Builds the real model, without memory for it."""
    import torch
    import transformers

    fields = dict(document)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
    with torch.device("meta"):
        model = auto.from_config(config)
        if not causal:
            return
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("document", "why"),
    [
        ({"model_type": "gpt2", "n_embd": 768, "n_head": 7}, "its n_embd of 768 cannot be divided among 7 heads"),
        ({"model_type": "gpt2", "n_head": 7}, "its n_embd of 768 cannot be divided among 7 heads (n_head)"),
        ({"model_type": "gpt2", "n_head": 0}, "its n_head must be a whole number from 1 on, not 0"),
        ({"model_type": "gpt2", "vocab_size": -5}, "its vocab_size must be a whole number from 1 on, not -5"),
        ({"model_type": "gpt2", "n_layer": "12"}, "its n_layer must be a whole number from 1 on, not '12'"),
        ({"model_type": "gpt2", "n_embd": 76.8}, "its n_embd must be a whole number from 1 on, not 76.8"),
        ({"model_type": "bert", **WIDTH_8, "num_attention_heads": 3}, "its hidden_size of 8 cannot be divided among 3"),
        ({"model_type": "distilbert", "dim": 10, "n_heads": 3}, "its dim of 10 cannot be divided among 3 heads"),
        ({"model_type": "deberta-v2", **WIDTH_8, "num_attention_heads": 3}, "cannot be divided among 3 heads"),
        ({"model_type": "llama", **WIDTH_8, "num_attention_heads": 3}, "cannot be divided among 3 heads"),
        (
            {"model_type": "qwen2", **WIDTH_8, "num_attention_heads": 4, "num_key_value_heads": 3},
            "its 4 heads (num_attention_heads) cannot share 3 keys and values (num_key_value_heads) evenly",
        ),
    ],
)
def test_model_sizes_that_cannot_be_built_are_refused_in_the_configuration_s_own_words(
    document: dict[str, Any], why: str
) -> None:
    with pytest.raises(UsageError) as refused:
        check_sizes(document, "m")
    assert str(refused.value).startswith("`model=m` cannot be built: ")
    assert why in str(refused.value)
    with pytest.raises(Exception):  # noqa: B017 - whatever transformers and torch say
        build(document)


@pytest.mark.parametrize("layers", [-1, 0, True])
def test_a_model_has_layers_although_transformers_builds_one_without(layers: int) -> None:
    with pytest.raises(UsageError, match=f"its n_layer must be a whole number from 1 on, not {layers}"):
        check_sizes({"model_type": "gpt2", "n_layer": layers}, "m")


@pytest.mark.parametrize(
    "document",
    [
        {"model_type": "mistral", **WIDTH_8, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 4},
        {"model_type": "qwen3", **WIDTH_8, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 2},
        {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "n_inner": None},
    ],
)
def test_unusual_model_sizes_that_can_be_built_are_accepted(document: dict[str, Any]) -> None:
    check_sizes(document, "m")
    build(document)


def test_unknown_model_family_is_refused_only_for_sizes_that_no_model_can_have() -> None:
    unknown: dict[str, Any] = {"model_type": "other", "hidden_size": 10, "num_attention_heads": 3}
    check_sizes({**unknown, "intermediate_size": [8, 16], "max_position_embeddings": -1}, "m")
    with pytest.raises(UsageError, match="its num_hidden_layers must be a whole number from 1 on, not -1"):
        check_sizes({**unknown, "num_hidden_layers": -1}, "m")


def test_the_part_about_text_is_what_is_checked() -> None:
    with pytest.raises(UsageError, match="its n_layer must be"):
        check_sizes({"model_type": "pictures", "n_layer": 1, "text_config": {"model_type": "gpt2", "n_layer": 0}}, "m")
