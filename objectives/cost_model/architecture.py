"""`Architecture`: a model's sizes and parameter count from its Hugging Face configuration, without building it.

Counts of the families in `FAMILIES` are from formulas (the tests compare them with the real models), all others from
the model as transformers builds it (`ModelFacts`). Where neither can be had they are a guess for the usual shape.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.workload.kinds import Workload
from ds_tune.objectives.workload.model_facts import ModelFacts
from ds_tune.objectives.workload.model_sizes import (
    BERT_LIKE,
    FAMILIES,
    LLAMA_LIKE,
    SIZE_NAMES,
    check_sizes,
    stated_sizes,
    text_configuration,
)

FUSED_ATTENTION = ("gpt2", "gpt_bigcode", "gpt_neox", "bloom", "falcon")
"""Families that project to queries, keys and values by one matrix."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The sizes that decide bytes and FLOPs."""

    model_type: str
    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    gated_mlp: bool
    """Llama's three matrices rather than GPT-2's two."""
    unfused_activation: bool
    """An activation that transformers writes out in Python, each of whose steps keeps a tensor (`gelu_new`)."""
    rms_norm: bool
    dropout: bool
    relative_columns: int
    """Columns of DeBERTa's scores by relative position, both directions together; 0 for other attention.
    There is no fused kernel for them."""
    parameters: int
    parameters_per_token: int
    """Parameters that one token is multiplied with: the experts that it goes to, and a shared layer each time."""
    block_parameters: int
    """Parameters of one transformer block."""
    block_matrices: int
    """Weights of a block that are no vectors: of attention, one or three and the output's, and of the MLP."""
    is_masked: bool
    """Trained on masked tokens, by a head that is more than one projection."""
    is_exact: bool
    """True where the count is known to be right for this family."""
    frozen_parameters: int = 0
    """Those of the parameters that are not trained, as under LoRA: they have no gradients and no optimizer states."""
    adapter_inputs: float = 0.0
    """Elements a token that a block keeps for its adapters, in units of its hidden size; only where most is frozen."""

    @property
    def trained_parameters(self) -> int:
        return self.parameters - self.frozen_parameters

    @property
    def active_parameters(self) -> int | None:
        """Parameters that one token is multiplied with, where they are fewer: among experts; else None."""
        return self.parameters_per_token if self.parameters_per_token < self.parameters else None

    @property
    def is_frozen(self) -> bool:
        """Whether the matrices of its blocks are not trained: nothing is kept for their gradients."""
        return self.frozen_parameters > self.layers * self.block_parameters / 2

    def enlarged(self, multiple: int) -> "Architecture":
        """With the vocabulary rounded up; the embedding and the projection are taken to be one tied matrix."""
        rows = -self.vocabulary % multiple
        more = rows * self.hidden
        return dataclasses.replace(
            self,
            vocabulary=self.vocabulary + rows,
            parameters=self.parameters + more,
            parameters_per_token=self.parameters_per_token + more,
        )

    def flops_per_sample(self, seq_len: int) -> float:
        """Model FLOPs of a sample's forward and backward pass: s × (4N + 2T + 12·L·H·Q·s).

        N parameters that a token is multiplied with, of which T are trained (6N where all are), L layers, H heads of
        dimension Q, s positions (Chowdhery et al. 2022, PaLM, appendix B).

        A rank computes the same of the model it has built (`rank.model.flops_per_sample`): measured figures rest on the
        real N also where the one here is a guess (`is_exact`).
        """
        products = 6 * self.parameters_per_token - 2 * self.frozen_parameters
        return float(seq_len * (products + 12 * self.layers * self.heads * self.head_dim * seq_len))


def architecture_of(workload: Workload) -> Architecture:
    """The architecture of a workload's model.

    Raises:
        UsageError: its configuration cannot be had here, or lacks the sizes.
    """
    document = workload.model_document()
    if document is None:
        raise UsageError(f"the sizes of {workload.title} are not known")
    facts = workload.model_facts()
    architecture = architecture_from_config(document, workload.title) if facts is None else architecture_of_facts(facts)
    if (counted := workload.parameter_counts) is None:
        return architecture
    return dataclasses.replace(
        architecture,
        parameters=counted.parameters,
        parameters_per_token=counted.parameters,
        frozen_parameters=counted.parameters - counted.trainable,
        adapter_inputs=counted.adapter_inputs,
        is_exact=True,
    )


def architecture_of_facts(facts: ModelFacts) -> Architecture:
    """The architecture of a model that has been built."""
    sizes = {
        field.name: getattr(facts, field.name)
        for field in dataclasses.fields(Architecture)
        if hasattr(facts, field.name)
    }
    return Architecture(**sizes, is_exact=True)


def architecture_from_config(document: Mapping[str, Any], model: str) -> Architecture:
    """Reads a configuration in transformers' JSON form.

    Raises:
        UsageError: it lacks the sizes of a transformer, or no model can have those that it says.
    """
    check_sizes(document, model)
    document = text_configuration(document)
    model_type = str(document.get("model_type", "unknown"))
    config = stated_sizes(document)

    def size(name: str, default: int | None = None) -> int:
        found = next((config[key] for key in SIZE_NAMES[name] if key in config), default)
        if not isinstance(found, int) or found < 1:
            raise UsageError(f"`model={model}`: its configuration does not say its {name.replace('_', ' ')}")
        return found

    hidden, layers, heads, vocabulary = size("hidden"), size("layers"), size("heads"), size("vocabulary")
    gated = model_type in LLAMA_LIKE or config.get("hidden_act") in ("silu", "swish", "gelu_pytorch_tanh")
    key_value_heads = size("key_value_heads", heads)
    head_dim = config.get("head_dim") or hidden // heads
    intermediate = size("intermediate", 4 * hidden)
    activation = config.get("activation_function", config.get("hidden_act", config.get("activation", "gelu")))
    if model_type == "gpt2":
        activation = config.get("activation_function", "gelu_new")
    attention = _linear(hidden, heads * head_dim) + 2 * _linear(hidden, key_value_heads * head_dim)
    attention += _linear(heads * head_dim, hidden)
    feed_forward = (3 if gated else 2) * _linear(hidden, intermediate)
    biases_and_norms, outside = _small_parameters(
        model_type, config, hidden=hidden, intermediate=intermediate, vocabulary=vocabulary,
        positions=size("positions", 1), layers=layers, query=heads * head_dim, key=key_value_heads * head_dim,
        head_dim=head_dim, gated=gated,
    )  # fmt: skip
    block = attention + feed_forward + biases_and_norms
    return Architecture(
        model_type=model_type,
        layers=layers,
        hidden=hidden,
        heads=heads,
        key_value_heads=key_value_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        vocabulary=vocabulary,
        gated_mlp=gated,
        unfused_activation=activation == "gelu_new",
        rms_norm=gated,
        dropout=_has_dropout(config, model_type),
        relative_columns=relative_columns(config, size("positions", 1)) if model_type.startswith("deberta") else 0,
        parameters=layers * block + outside,
        parameters_per_token=layers * block + outside,
        block_parameters=block,
        block_matrices=(1 if model_type in FUSED_ATTENTION else 3) + 1 + (3 if gated else 2),
        is_masked=model_type in (*BERT_LIKE, "distilbert", "deberta-v2"),
        is_exact=model_type in FAMILIES,
    )


def _has_dropout(config: Mapping[str, Any], model_type: str) -> bool:
    stated = [config[key] for key in ("resid_pdrop", "hidden_dropout_prob", "dropout") if key in config]
    # transformers' defaults are 0.1 in these families.
    return any(stated) if stated else model_type in ("gpt2", *BERT_LIKE, "distilbert", "deberta-v2")


def _relative_span(config: Mapping[str, Any], positions: int) -> int:
    """Number of relative positions that DeBERTa tells apart, to each side."""
    buckets, reach = config.get("position_buckets", -1), config.get("max_relative_positions", -1)
    return int(buckets if buckets > 0 else reach if reach > 0 else positions)


def relative_columns(config: Mapping[str, Any], positions: int) -> int:
    """Columns of DeBERTa's scores by relative position, both directions together."""
    if not config.get("relative_attention", False):
        return 0
    return 2 * _relative_span(config, positions) * len({"c2p", "p2c"}.intersection(config.get("pos_att_type") or []))


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs


def _small_parameters(
    model_type: str,
    config: Mapping[str, Any],
    *,
    hidden: int,
    intermediate: int,
    vocabulary: int,
    positions: int,
    layers: int,
    query: int,
    key: int,
    head_dim: int,
    gated: bool,
) -> tuple[int, int]:
    """(biases, norms and extras of one block, everything outside the blocks), as transformers builds the family."""
    embedding = vocabulary * hidden
    if gated:
        biases = 0
        if model_type == "qwen2":
            biases = query + 2 * key
        elif config.get("attention_bias"):
            biases = query + 2 * key + hidden
        if config.get("mlp_bias"):
            biases += 2 * intermediate + hidden
        norms = 2 * hidden + (2 * head_dim if model_type == "qwen3" else 0)
        head = 0 if config.get("tie_word_embeddings", False) else embedding
        return biases + norms, embedding + hidden + head
    biases = query + 2 * key + hidden + intermediate + hidden
    norms = 4 * hidden
    types = int(config.get("type_vocab_size", 0))
    # The masked-language-model head: a dense layer, a norm, and a bias for each token; its matrix is the embedding.
    masked_head = hidden * hidden + hidden + 2 * hidden + vocabulary
    if model_type in BERT_LIKE or model_type == "distilbert":
        return biases + norms, embedding + (positions + types) * hidden + 2 * hidden + masked_head
    if model_type == "deberta-v2":
        outside = embedding + 2 * hidden + types * hidden + masked_head
        if config.get("position_biased_input", True):
            outside += positions * hidden
        if config.get("relative_attention", False):
            outside += 2 * _relative_span(config, positions) * hidden
            if "layer_norm" in str(config.get("norm_rel_ebd", "none")):
                outside += 2 * hidden
        if (kernel := config.get("conv_kernel_size", 0)) > 0:
            outside += hidden * hidden * kernel // int(config.get("conv_groups", 1)) + 3 * hidden
        share = config.get("share_att_key", False)
        kinds = config.get("pos_att_type") or []
        extra = 0
        if config.get("relative_attention", False) and not share:
            extra = sum(hidden * hidden + hidden for kind in ("c2p", "p2c") if kind in kinds)
        return biases + norms + extra, outside
    tied = config.get("tie_word_embeddings", True)
    return biases + norms, embedding * (1 if tied else 2) + positions * hidden + 2 * hidden
