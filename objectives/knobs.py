"""Knobs of a `TrialConfig`: their values, where they apply, and how they reach DeepSpeed or the model.

A knob that is a DeepSpeed setting is one entry: a field of `TrialConfig` declared with `knob(...)`. Names, table
columns, search dimensions, recorded surfaces and the exported files derive from it. A knob of the model itself
(`in_model`) also needs its lines in `objectives.rank.knobs`, which run where torch is.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from ds_tune.objectives.words import shown

Scalar: TypeAlias = int | str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KnobContext:
    """Facts of a machine and a model that decide, besides the configuration, whether a knob applies."""

    device: str = "cuda"
    ranks: int = 1
    vocabulary: int = 0
    """Columns of the output projection; 0 where they are not known."""
    flash_attention: bool = False
    """The FlashAttention-2 package is installed and the GPUs can run it (compute capability 8.0 and up)."""
    liger: bool = False
    """The package liger-kernel is installed."""
    compute_capability: tuple[int, int] = (0, 0)
    """The GPUs' own, such as (9, 0) for an H200; (0, 0) where it is not known."""
    dtype: str = "fp16"
    """The workload's precision."""
    stage_0_trains: bool = True
    """Training at ZeRO stage 0 keeps its gradients; see `objectives.loss_scale`."""
    model_type: str = ""
    """As transformers calls the model's family; empty where it is not known."""
    grouped_queries: bool = False
    """Several heads of its attention share a key and a value."""
    pretrained: bool = False
    """Its weights are loaded, so that their shapes are given."""
    states_share: float = 0.0
    """Fraction of a rank's memory that parameters and optimizer states take under ZeRO-1; 0 where it is not known."""
    out_of_reach: frozenset[str] = frozenset()
    """Knobs that the training cannot be given, whatever else holds."""


def whole_number(field: str, value: Any) -> int:
    """Returns a value that is a whole number.

    Raises:
        ValueError: it is none, or more than any setting can be.
    """
    if isinstance(value, float) and value.is_integer():  # 5e8, as DeepSpeed's files have it
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{field} takes whole numbers, not {shown(value)}")
    if abs(value) >= 2**63:
        raise ValueError(f"{field} takes whole numbers below 2^63")
    return value


Applies: TypeAlias = Callable[[Mapping[str, Any], KnobContext], bool]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """One knob; its value "off" leaves things as the user's settings, DeepSpeed or transformers have them."""

    off: Scalar
    values: tuple[Scalar, ...]
    """The others, in the order to list them."""
    label: str
    """In names, before the value."""
    short: str
    """A column's heading."""
    meaning: str
    """One sentence for the documentation."""
    applies: Applies
    writes: Callable[[Any], Mapping[str, Any]] | None
    """Settings of the DeepSpeed configuration that a value makes."""
    in_model: bool
    """Whether it changes how the model runs, so that the training script has to do it."""
    speed: tuple[Scalar, ...]
    """Values that keep the numbers and usually pay where `pays`: the preset `speed` has them there."""
    pays: Callable[[KnobContext], bool]
    saving: Scalar | None
    """Value to fall back on where nothing else fits."""
    numerics: str | None
    """Change that it makes to the numbers that training produces; such a knob is searched only on request."""

    def usual(self, context: KnobContext) -> tuple[Scalar, ...]:
        """Values that the preset `speed` has of it here."""
        return self.speed if self.pays(context) else ()

    def checked(self, field: str, value: Any) -> Scalar:
        """Returns a value that a person or a file gave, if the knob can have it.

        Raises:
            ValueError: it cannot; the text says what it can have.
        """
        if isinstance(self.off, int):
            number = whole_number(field, value)
            if number < 0:
                raise ValueError(f"{field} is 0 for off, or more, not {number}")
            return number
        if not isinstance(value, str) or value not in (self.off, *self.values):
            raise ValueError(f"{field} is one of {', '.join(map(str, (self.off, *self.values)))}, not {shown(value)}")
        return value

    def words(self, value: Scalar) -> str:
        """A value in a configuration's name, large counts as DeepSpeed's autotuner writes them."""
        if isinstance(value, str):
            return f"{self.label}-{value}"
        return f"{self.label}{value:.1e}" if value >= 10**6 else f"{self.label}{value}"


def always(config: Mapping[str, Any], context: KnobContext) -> bool:
    """For a knob that has a meaning everywhere."""
    return True


def anywhere(context: KnobContext) -> bool:
    return True


CROWDED_SHARE = 0.5
"""Fraction of a rank's memory. Where states take more, small micro-batches, or none that fits, cost more than an
optimizer on the host does."""


def states_crowd_the_memory(context: KnobContext) -> bool:
    return context.states_share > CROWDED_SHARE


def knob(
    *,
    off: Scalar,
    values: tuple[Scalar, ...],
    label: str,
    short: str,
    meaning: str,
    applies: Applies = always,
    writes: Callable[[Any], Mapping[str, Any]] | None = None,
    in_model: bool = False,
    speed: tuple[Scalar, ...] = (),
    pays: Callable[[KnobContext], bool] = anywhere,
    saving: Scalar | None = None,
    numerics: str | None = None,
) -> Any:
    """A field of `TrialConfig` that is a knob; see `Knob` for the arguments."""
    entry = Knob(
        off=off,
        values=values,
        label=label,
        short=short,
        meaning=meaning,
        applies=applies,
        writes=writes,
        in_model=in_model,
        speed=speed,
        pays=pays,
        saving=saving,
        numerics=numerics,
    )
    return dataclasses.field(default=off, metadata={"knob": entry})


def zero(**settings: Any) -> Mapping[str, Any]:
    """Settings of DeepSpeed's `zero_optimization`."""
    return {"zero_optimization": settings}


def partitions(config: Mapping[str, Any], context: KnobContext) -> bool:
    """ZeRO spreads something over several ranks."""
    return bool(config["zero_stage"] >= 1 and context.ranks > 1)


def reduces_by_owner(config: Mapping[str, Any], context: KnobContext) -> bool:
    """ZeRO-1 and 2, whose gradients go to the rank that owns them."""
    return config["zero_stage"] in (1, 2) and context.ranks > 1


def gathers(config: Mapping[str, Any], context: KnobContext) -> bool:
    """ZeRO-3 over several ranks: parameters are gathered layer by layer."""
    return bool(config["zero_stage"] == 3 and context.ranks > 1)


def has_states_apart(config: Mapping[str, Any], context: KnobContext) -> bool:
    """Stages whose optimizer DeepSpeed can keep elsewhere; on a CPU it is there already."""
    return bool(config["zero_stage"] >= 1 and context.device == "cuda")


def can_compile(config: Mapping[str, Any], context: KnobContext) -> bool:
    """ZeRO-3's hooks around each module break a compiled block into pieces; DeepCompile writes them into the graph.

    DeepSpeed 0.19 has DeepCompile for CUDA and for stages with partitions; but at stage 1 it aborts where gradients
    accumulate over micro-batches: one that reduces nothing flushes buckets that the step before has released
    (`DoubleBufferedReduceBucket::swap` in deepcompile.h).
    """
    if config["compile"] == "deepcompile":
        return bool(config["zero_stage"] >= 2 and context.device == "cuda")
    return bool(config["zero_stage"] != 3)


def has_an_odd_vocabulary(config: Mapping[str, Any], context: KnobContext) -> bool:
    """Matrix units work on multiples of 64 columns; GPT-2's 50257 is none."""
    return context.vocabulary % 64 != 0


def can_enlarge_vocabulary(config: Mapping[str, Any], context: KnobContext) -> bool:
    """Either the model's own columns are more, or they are padded; loaded weights have as many as they have."""
    return has_an_odd_vocabulary(config, context) and not context.pretrained and not config.get("padded_vocabulary")


def on_a_gpu(config: Mapping[str, Any], context: KnobContext) -> bool:
    return context.device == "cuda"


def attention_runs(config: Mapping[str, Any], context: KnobContext) -> bool:
    """A kernel that the GPU's generation cannot run is never offered."""
    in_half = context.dtype != "fp32"
    return context.device == "cuda" and {
        "flash_attention_2": context.flash_attention and in_half,
        "sdpa_flash": context.compute_capability >= (8, 0) and in_half,
        "sdpa_cudnn": context.compute_capability >= (9, 0) and in_half,
        "sdpa_efficient": not context.grouped_queries,  # its kernel wants a key and a value for each head
    }.get(config["attention"], True)


HEAD_THEN_LOSS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
"""Models of transformers whose loss is taken of what the output projection gives, neither scaled nor capped."""

LOSS_CHUNKS = 8
"""Pieces of a micro-batch's tokens whose logits are never there together."""


def loss_can_be_taken_apart(config: Mapping[str, Any], context: KnobContext) -> bool:
    """A model compiled as a whole would be cut in two at the loss.

    Liger's kernels take the gradients in the forward pass, before fp16's loss scale has lifted them above what fp16
    can hold (linkedin/Liger-Kernel#512), and have no use for padded columns.
    """
    if context.model_type not in HEAD_THEN_LOSS or config.get("compile") in ("model", "deepcompile"):
        return False
    if config["loss_computation"] != "liger":
        return True
    runs = context.liger and context.device == "cuda" and context.compute_capability >= (8, 0)
    return runs and context.dtype != "fp16" and not config.get("padded_vocabulary")


def has_bf16_beside_fp16(config: Mapping[str, Any], context: KnobContext) -> bool:
    """GPUs before compute capability 8.0 have no bf16."""
    return context.dtype == "fp16" and (context.device == "cpu" or context.compute_capability >= (8, 0))


def can_offload_optimizer(config: Mapping[str, Any], context: KnobContext) -> bool:
    """DeepSpeed splits the states between GPU and host in ZeRO-3 only."""
    return has_states_apart(config, context) and (
        config["offload_optimizer"] != "cpu_half" or config["zero_stage"] == 3
    )


def partitions_parameters_on_a_gpu(config: Mapping[str, Any], context: KnobContext) -> bool:
    """ZeRO-3 on GPUs; on a CPU parameters are in the host's memory already."""
    return config["zero_stage"] == 3 and context.device == "cuda"


def splits_into_groups(config: Mapping[str, Any], context: KnobContext) -> bool:
    """Several whole groups of ranks, each with its own copy of the parameters."""
    size = config["parameter_group"]
    return bool(config["zero_stage"] == 3 and context.ranks > size and context.ranks % size == 0)


def gathers_on_gpus(config: Mapping[str, Any], context: KnobContext) -> bool:
    """DeepSpeed's quantisation is CUDA code."""
    return gathers(config, context) and context.device == "cuda"
