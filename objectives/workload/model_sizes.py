"""The sizes in a Hugging Face configuration: what each family calls them, and which no model can have."""

from collections.abc import Mapping
from typing import Any

from ds_tune.objectives.errors import UsageError

SIZE_NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "dim", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "key_value_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim",),
    "intermediate": ("intermediate_size", "n_inner", "hidden_dim", "ffn_dim", "ffn_hidden_size"),
    "positions": ("max_position_embeddings", "n_positions"),
    "vocabulary": ("vocab_size",),
}
"""The families' own names for the sizes."""

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12},
    "llama": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
              "num_attention_heads": 32},
    "mistral": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                "num_attention_heads": 32, "num_key_value_heads": 8},
    "qwen2": {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
              "num_attention_heads": 32},
    "qwen3": {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
              "num_attention_heads": 32, "head_dim": 128},
    "bert": {"vocab_size": 30522, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
             "num_attention_heads": 12, "max_position_embeddings": 512, "type_vocab_size": 2},
    "roberta": {"vocab_size": 50265, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                "num_attention_heads": 12, "max_position_embeddings": 512, "type_vocab_size": 2, "pad_token_id": 1},
    "distilbert": {"vocab_size": 30522, "dim": 768, "hidden_dim": 3072, "n_layers": 6, "n_heads": 12,
                   "max_position_embeddings": 512},
    "deberta-v2": {"vocab_size": 128100, "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 24,
                   "num_attention_heads": 24, "max_position_embeddings": 512, "type_vocab_size": 0},
}  # fmt: skip
"""Families whose parameters are counted exactly, with what transformers fills in where a configuration leaves out a
key that matters to the count."""

FAMILY_HEADS = {
    "gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM",
    "distilbert": "DistilBertForMaskedLM", "deberta-v2": "DebertaV2ForMaskedLM",
}  # fmt: skip
"""Class of each of these families whose parameters are counted."""

POSITIONS_BEGIN_AFTER_PADDING = (
    "camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm",
    "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
"""Types whose first token has the position after that of padding, so that fewer tokens have one."""

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
BERT_LIKE = ("bert", "roberta")
HEADS_SPLIT_THE_WIDTH = ("gpt2", "llama", *BERT_LIKE, "distilbert", "deberta-v2")
"""The others may say the width of a head apart."""


def text_configuration(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part about the language model, where a configuration has several."""
    text = document.get("text_config")
    return text if isinstance(text, Mapping) and text else document


def is_counted_by_formula(document: Mapping[str, Any]) -> bool:
    """Whether a configuration is one of a family that is counted exactly, and of the class that is counted."""
    family = document.get("model_type")
    named = document.get("architectures") or [FAMILY_HEADS.get(str(family))]
    return family in FAMILIES and named == [FAMILY_HEADS[family]] and "text_config" not in document


def usable_positions(model_type: str, limit: Any, padding: Any) -> int | None:
    """Tokens that a sample may have; None where there is no limit.

    Args:
        limit: positions that the configuration says; XLNet has -1 for no limit.
        padding: its `pad_token_id`.
    """
    if not isinstance(limit, int) or limit < 1:
        return None
    if model_type == "prophetnet":
        return limit - int(padding or 0) - 2  # its second stream looks one further ahead
    return limit - int(padding or 0) - 1 if model_type in POSITIONS_BEGIN_AFTER_PADDING else limit


def check_length(limit: int | None, seq_len: int, model: str) -> None:
    """
    Raises:
        UsageError: a sample is longer than the model takes.
    """
    if limit is not None and seq_len > limit:
        raise UsageError(f"{model} takes at most {limit} positions; `seq_len={seq_len}` is too long")


def stated_sizes(document: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with its family's defaults for what it leaves out."""
    defaults = FAMILIES.get(str(document.get("model_type")), {})
    return {**defaults, **{key: value for key, value in document.items() if value is not None}}


def check_sizes(document: Mapping[str, Any], model: str) -> None:
    """Finds sizes that no model can have, before anybody tries to build it.

    Of a family that is not known here only what is sure: some have sizes that differ from layer to layer.

    Raises:
        UsageError: there are such.
    """
    document = text_configuration(document)
    family = str(document.get("model_type"))
    is_known = family in FAMILIES
    config = stated_sizes(document)
    keys = {name: next((key for key in known if key in config), "") for name, known in SIZE_NAMES.items()}
    for name in SIZE_NAMES if is_known else ("layers", "hidden", "vocabulary"):
        value = config.get(keys[name], 1)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if value < 1 if is_whole else is_known:
            raise UsageError(
                f"`model={model}` cannot be built: its {keys[name]} must be a whole number from 1 on, not {value!r}"
            )
    hidden, heads, shared = (keys[name] for name in ("hidden", "heads", "key_value_heads"))
    if family in HEADS_SPLIT_THE_WIDTH and config[hidden] % config[heads]:
        raise UsageError(
            f"`model={model}` cannot be built: its {hidden} of {config[hidden]} cannot be divided among "
            f"{config[heads]} heads ({heads})"
        )
    if family in LLAMA_LIKE and shared and config[heads] % config[shared]:
        raise UsageError(
            f"`model={model}` cannot be built: its {config[heads]} heads ({heads}) cannot share "
            f"{config[shared]} keys and values ({shared}) evenly"
        )
