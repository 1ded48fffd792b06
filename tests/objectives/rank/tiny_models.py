"""A tiny configuration of every model type of transformers with a causal or masked head, and the table of what tunes.

python -P tests/objectives/rank/tiny_models.py      # writes the table in docs/support.md anew
"""

import copy
import re
import textwrap
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from ds_tune.objectives.rank.model_config import Refusal, head_of

SUPPORT = Path(__file__).parents[3] / "docs" / "support.md"
TABLE = re.compile(r"(?<=<!-- model types -->\n).*(?=<!-- end of model types -->)", re.DOTALL)

CAUSAL, MASKED = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
MODEL_TYPES = sorted({*CAUSAL, *MASKED})
OTHER_TYPES = sorted(set(transformers.CONFIG_MAPPING) - {*MODEL_TYPES})
WHOLE_TYPES = sorted(set(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES) & set(OTHER_TYPES))
"""Encoders with a decoder, of which none is trained alone."""

LENGTH = 16

SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "d_embed", "d_latents"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "hidden_dim", "d_ff", "ffn_dim", "d_inner"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "attention_head_size", "v_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "entity_emb_size"), 16),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 128),
    **dict.fromkeys(("n_group", "topk_group", "num_blocks", "pad_token_id"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "num_latents"), 8),
    "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "mamba_n_heads": 4,
    "mamba_d_head": 16, "mamba_expand": 2, "rotary_dim": 4, "entity_vocab_size": 64, "bos_token_id": 0,
    "eos_token_id": 2, "encoder_hash_byte_group_vocab": 100,
}  # fmt: skip
"""Sizes by the names that the types have for them."""

OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
             "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "dots1": {"num_key_value_heads": 4, "n_shared_experts": 1, "n_routed_experts": 4},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
                     "activation_sparsity_pattern": [0.0, 0.0]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2, "ffn_hidden_size": 48, "num_attention_heads": 4,
                      "num_key_value_heads": 4, "head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "neomme": {"head_dim": 16},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe"]},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
                       "indexer_compress_ratio": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xlstm": {"hidden_size": 128, "num_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "layers_block_type": ["mamba", "mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""Keys that only these types have, or without which they cannot be this small."""

NOT_TRIED = {
    "blt": "the sizes of its four parts depend on each other",
    "cohere_compass_text": "needs the configuration of a vision-language model",
    "gemma3n": "needs the package pillow",
    "gemma4_assistant": "drafts tokens for another model, and has no vocabulary of its own",
    "gemma4_unified_assistant": "drafts tokens for another model, and has no vocabulary of its own",
    "musicgen": "needs the configurations of three models",
    "musicgen_melody": "needs the configurations of three models",
    "qwen4_exp": "needs settings of its own; its text model is `qwen4_exp_text`",
}
"""Types of which no tiny model can be built, or run, from the type's own defaults."""


def tiny_config(model_type: str) -> transformers.PretrainedConfig:
    """The configuration of a type whose model has few parameters; its head is the causal one, else the masked one."""
    config_class = transformers.CONFIG_MAPPING[model_type]
    fields = {
        key: value
        for key, value in _shrunk(config_class().to_dict()).items()
        if key not in getattr(config_class, "attribute_map", {})
    }
    if "kv_lora_rank" in fields:
        fields.pop("head_dim", None)  # it is that of the rotated part there
        fields["num_key_value_heads"] = 4
    config: transformers.PretrainedConfig = config_class(**{**fields, **OWN.get(model_type, {})})
    if getattr(config, "is_encoder_decoder", False):
        config.architectures = [CAUSAL[model_type]]
    config.use_cache = False
    return config


def _shrunk(document: dict[str, Any]) -> dict[str, Any]:
    """The sizes of a configuration, and of those within it, each made small."""
    small: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and "model_type" in value:
            small[key] = {"model_type": value["model_type"], **_shrunk(value)}
        elif key in SMALL and isinstance(value, int | None) and not isinstance(value, bool):
            small[key] = SMALL[key]
        elif key in ("layer_types", "mlp_layer_types", "layers_block_type") and isinstance(value, list):
            small[key] = (list(dict.fromkeys(value)) * 2)[:2]
    return small


def built(config: transformers.PretrainedConfig) -> Any:
    """The model that is trained of a configuration, with weights."""
    torch.manual_seed(0)
    # Decoders that are built alone write into their configuration that they are.
    return head_of(config).auto_class.from_config(copy.deepcopy(config), trust_remote_code=False).train()


def train(model: Any, length: int = LENGTH) -> torch.Tensor:
    """A forward and a backward pass as trials have them; the loss."""
    text = model.config.get_text_config()
    ids = torch.randint(4, min(getattr(text, "vocab_size", 100), 100), (2, length))
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach()


def row(model_type: str, *, has_trained: bool = False) -> str:
    """The line of the table.

    Args:
        has_trained: the model has been trained already, and need not be again.
    """
    if (reason := NOT_TRIED.get(model_type)) is not None:
        return f"| `{model_type}` | – | not tried: {reason} |"
    try:
        head = head_of(tiny_config(model_type))
    except Refusal as error:
        [reason] = re.findall(r"\((.*)\)", str(error))
        return f"| `{model_type}` | – | refused: {reason} |"
    config = tiny_config(model_type)
    if not has_trained:
        train(built(config))
    whole = getattr(config, "is_encoder_decoder", False)
    words = "tunes, its decoder alone, where `architectures` names it; refused otherwise" if whole else "tunes"
    return f"| `{model_type}` | {head.trained_class} | {words} |"


def table() -> str:
    """The text between the marks in docs/support.md."""
    rows = [row(model_type) for model_type in MODEL_TYPES]
    return "\n".join(("", "| type | trained | |", "|---|---|---|", *rows, "", *other_types(), ""))


def other_types() -> list[str]:
    """The lines on types that have neither head."""
    lines = []
    alone = [each for each in OTHER_TYPES if each not in WHOLE_TYPES]
    for words, types in (
        ("Refused, for they are encoders with a decoder and no causal or masked head", WHOLE_TYPES),
        ("Refused, for they have no causal or masked head", alone),
    ):
        text = f"{words}: {', '.join(f'`{each}`' for each in types)}."
        lines += [*textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False), ""]
    return lines


if __name__ == "__main__":
    SUPPORT.write_text(TABLE.sub(lambda _: table(), SUPPORT.read_text()))
