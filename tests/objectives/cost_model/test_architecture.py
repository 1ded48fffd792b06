"""Parameter counts come from the configuration alone, and are those of the real model."""

import json
from pathlib import Path
from typing import Any

import pytest

from ds_tune.objectives.cost_model.architecture import FAMILIES, architecture_from_config, architecture_of
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.workload.huggingface import SHIPPED_MODELS, HuggingFaceWorkload

SMALL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 500, "n_positions": 64},
    "llama": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
              "intermediate_size": 150, "vocab_size": 500},
    "mistral": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                "intermediate_size": 150, "vocab_size": 500, "head_dim": 16},
    "qwen2": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "intermediate_size": 150, "vocab_size": 500, "tie_word_embeddings": True},
    "qwen3": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "intermediate_size": 150, "vocab_size": 500, "head_dim": 32},
    "bert": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 100,
             "vocab_size": 500},
    "roberta": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 100,
                "vocab_size": 500, "type_vocab_size": 1, "max_position_embeddings": 514},
    "distilbert": {"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 100, "vocab_size": 500},
    "deberta-v2": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 100,
                   "vocab_size": 500, "relative_attention": True, "position_buckets": 32, "norm_rel_ebd": "layer_norm",
                   "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "conv_kernel_size": 3,
                   "position_biased_input": False, "max_relative_positions": -1},
}  # fmt: skip


def real_model(model_type: str, fields: dict[str, Any]) -> Any:
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **fields)
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and model_type not in ("bert", "roberta")
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
    with torch.device("meta"):
        return auto.from_config(config)


def real_count(model_type: str, fields: dict[str, Any]) -> int:
    return sum(parameter.numel() for parameter in real_model(model_type, fields).parameters())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_count_is_the_real_models(model_type: str) -> None:
    fields = SMALL[model_type]
    counted = architecture_from_config({"model_type": model_type, **fields}, model_type)
    assert counted.is_exact
    assert counted.parameters == real_count(model_type, fields)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_block_has_as_many_matrices_as_the_real_models(model_type: str) -> None:
    fields = SMALL[model_type]
    counted = architecture_from_config({"model_type": model_type, **fields}, model_type)
    # A block's parameters have its number in their names; a convolution, which the first block alone has, does not.
    first = [
        parameter
        for name, parameter in real_model(model_type, fields).named_parameters()
        if ".0." in name and parameter.dim() > 1
    ]
    assert counted.block_matrices == len(first)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_flops_of_a_sample_are_those_that_a_rank_computes_of_the_real_model(model_type: str) -> None:
    from ds_tune.objectives.rank.model import flops_per_sample

    fields = SMALL[model_type]
    counted = architecture_from_config({"model_type": model_type, **fields}, model_type)
    real = real_model(model_type, fields)
    assert counted.flops_per_sample(32) == flops_per_sample(real.config, real.num_parameters(), 32)


@pytest.mark.parametrize("model", SHIPPED_MODELS)
def test_the_shipped_models_are_counted_exactly(model: str) -> None:
    fields = dict(SHIPPED_MODELS[model])
    counted = architecture_of(HuggingFaceWorkload(model=model, seq_len=128, dtype="fp16"))
    assert counted.parameters == real_count(fields.pop("model_type"), fields)


def test_an_unknown_family_of_the_usual_shape_is_guessed_within_a_tenth() -> None:
    fields = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 700,
              "vocab_size": 1000, "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1,
              "eos_token_id": 2}  # fmt: skip
    guessed = architecture_from_config({"model_type": "smollm3", "hidden_act": "silu", **fields}, "smollm3")
    assert not guessed.is_exact
    assert guessed.parameters == pytest.approx(real_count("smollm3", fields), rel=0.1)


def test_a_local_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **SMALL["gpt2"]}))
    counted = architecture_of(HuggingFaceWorkload(model=str(tmp_path), seq_len=32, dtype="fp32"))
    assert counted.layers == 3
    assert counted.flops_per_sample(32) == 32 * (6 * counted.parameters + 12 * 3 * 64 * 32)


def test_a_configuration_without_sizes_is_refused_in_the_users_words() -> None:
    with pytest.raises(UsageError, match="does not say its hidden"):
        architecture_from_config({"model_type": "resnet"}, "resnet")
