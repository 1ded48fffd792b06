"""A trial's question (`TrialConfig`) and its answer (`Outcome = Measurement | Failure`).

Every type is frozen and turns into JSON and back without loss. In JSON an outcome carries its type in the
key `type`, so that a reader never has to guess from which keys are present.
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, Self, TypeAlias

from ds_tune.objectives.knobs import (
    Knob,
    KnobContext,
    attention_runs,
    can_compile,
    can_enlarge_vocabulary,
    can_offload_optimizer,
    gathers,
    gathers_on_gpus,
    has_an_odd_vocabulary,
    has_bf16_beside_fp16,
    knob,
    loss_can_be_taken_apart,
    on_a_gpu,
    partitions,
    partitions_parameters_on_a_gpu,
    reduces_by_owner,
    splits_into_groups,
    states_crowd_the_memory,
    zero,
)
from ds_tune.objectives.timing.step_parts import StepParts

OFFLOADED: dict[str, dict[str, Any]] = {
    "cpu": {"offload_optimizer": {"device": "cpu", "pin_memory": True}},
    # DeepSpeed gives whole groups of parameters to one side or the other, and by default has groups of 1e9 elements:
    # most models would be a single one.
    "cpu_half": {
        "offload_optimizer": {"device": "cpu", "pin_memory": True, "ratio": 0.5},
        "sub_group_size": 50_000_000,
    },
}
"""Settings of `zero_optimization` by the value of `offload_optimizer`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrialConfig:
    """One point of the search space; enough, beside the workload, to launch a trial."""

    zero_stage: int
    micro_batch_size: int
    """Samples a rank takes through one forward and backward pass."""
    gradient_accumulation_steps: int
    activation_checkpointing: int = knob(
        off=0, values=(1, 2), label="ac", short="ckpt", in_model=True, speed=(1,), saving=1,
        meaning="every how many transformer blocks one forgets its activations and computes them again: 1 for all",
    )  # fmt: skip
    compile: str = knob(
        off="off", values=("blocks", "model", "deepcompile"), label="compile", short="compile", in_model=True,
        speed=("blocks",), applies=can_compile,
        writes=lambda value: {"compile": {"deepcompile": True}} if value == "deepcompile" else {},
        meaning="torch.compile of each transformer block, of the whole model, or with ZeRO's collectives in the graph",
    )  # fmt: skip
    padded_vocabulary: int = knob(
        off=0, values=(64, 128), label="pv", short="pad", in_model=True, speed=(64,), applies=has_an_odd_vocabulary,
        meaning="the output projection is computed with its columns padded to a multiple, the extra logits left out of "
        "the loss: the numbers stay as they are",
    )  # fmt: skip
    loss_computation: str = knob(
        off="default", values=("chunked", "liger"), label="loss", short="loss", in_model=True,
        applies=loss_can_be_taken_apart,
        meaning="the logits are made, and their loss taken, for some tokens at a time: they are never all there",
    )  # fmt: skip
    attention: str = knob(
        off="default", values=("eager", "flash_attention_2", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn"),
        label="attention", short="attention", in_model=True, applies=attention_runs,
        meaning="transformers' attention: written out, the FlashAttention-2 package, or one of torch's own kernels",
    )  # fmt: skip
    optimizer: str = knob(
        off="default", values=("torch_fused",), label="adam", short="optimizer", applies=on_a_gpu,
        writes=lambda value: {"optimizer": {"params": {"torch_adam": True, "fused": True}}},
        meaning="torch's fused AdamW in place of DeepSpeed's FusedAdam",
    )  # fmt: skip
    throughput_timer: str = knob(
        off="default", values=("off",), label="timer", short="timer", applies=on_a_gpu,
        writes=lambda value: {"timers": {"throughput": {"enabled": False}}},
        meaning="DeepSpeed's own timer, on by default, waits for the GPU twice a micro-step, or is switched off",
    )  # fmt: skip
    overlap_comm: str = knob(
        off="default", values=("on", "off"), label="overlap", short="overlap", applies=partitions,
        writes=lambda value: zero(overlap_comm=value == "on"),
        meaning="gradients are reduced while the backward pass goes on; ZeRO-3's default is on, the others' off",
    )  # fmt: skip
    bucket_elements: int = knob(
        off=0, values=(50_000_000, 200_000_000, 1_000_000_000), label="rbs", short="bucket", applies=partitions,
        writes=lambda value: zero(reduce_bucket_size=value, allgather_bucket_size=value),
        meaning="elements that are reduced, and gathered, at a time (`reduce_bucket_size`, `allgather_bucket_size`)",
    )  # fmt: skip
    contiguous_gradients: str = knob(
        off="default", values=("off",), label="contiguous", short="contiguous", applies=reduces_by_owner,
        writes=lambda value: zero(contiguous_gradients=False),
        meaning="gradients are copied to one buffer as they appear, or not",
    )  # fmt: skip
    round_robin_gradients: str = knob(
        off="default", values=("on",), label="roundrobin", short="round robin", applies=reduces_by_owner,
        writes=lambda value: zero(round_robin_gradients=True),
        meaning="ranks take turns in owning gradients, which spreads their copying",
    )  # fmt: skip
    offload_optimizer: str = knob(
        off="off", values=("cpu", "cpu_half"), label="offload", short="offload", applies=can_offload_optimizer,
        speed=("cpu",), pays=states_crowd_the_memory, saving="cpu",
        writes=lambda value: zero(**OFFLOADED[value]),
        meaning="optimizer states, or half of them, live in the host's memory and are updated there",
    )  # fmt: skip
    offload_parameters: str = knob(
        off="off", values=("cpu",), label="poffload", short="offload params", applies=partitions_parameters_on_a_gpu,
        saving="cpu",
        writes=lambda value: zero(offload_param={"device": "cpu", "pin_memory": True}),
        meaning="ZeRO-3's partitions of the parameters live in the host's memory",
    )  # fmt: skip
    prefetch_elements: int = knob(
        off=0, values=(200_000_000,), label="pf", short="prefetch", applies=gathers,
        writes=lambda value: zero(stage3_prefetch_bucket_size=value),
        meaning="parameters that ZeRO-3 gathers ahead (`stage3_prefetch_bucket_size`)",
    )  # fmt: skip
    persistent_elements: int = knob(
        off=0, values=(1_000_000,), label="pp", short="persist", applies=gathers,
        writes=lambda value: zero(stage3_param_persistence_threshold=value),
        meaning="parameters smaller than this stay gathered (`stage3_param_persistence_threshold`)",
    )  # fmt: skip
    live_elements: int = knob(
        off=0, values=(200_000_000,), label="lp", short="live", applies=gathers,
        writes=lambda value: zero(stage3_max_live_parameters=value, stage3_max_reuse_distance=value),
        meaning="the most parameters that stay gathered (`stage3_max_live_parameters`)",
    )  # fmt: skip
    parameter_group: int = knob(
        off=0, values=(2, 4, 8), label="hpz", short="group", applies=splits_into_groups,
        writes=lambda value: zero(zero_hpz_partition_size=value),
        meaning="each so many ranks keep a copy of the parameters for the backward pass (`zero_hpz_partition_size`)",
    )  # fmt: skip
    precision: str = knob(
        off="workload", values=("bf16",), label="precision", short="precision", applies=has_bf16_beside_fp16,
        writes=lambda value: {"bf16": {"enabled": True}, "fp16": {"enabled": False}},
        numerics="bf16 in place of fp16: a wider range, so no loss scale and no skipped steps, but 3 bits less precise",
        meaning="bf16 in place of the workload's fp16",
    )  # fmt: skip
    dropout: str = knob(
        off="model", values=("none",), label="dropout", short="dropout", in_model=True,
        numerics="dropout is switched off: the model is regularised less",
        meaning="the model's dropout probabilities, or none",
    )  # fmt: skip
    vocabulary: int = knob(
        off=0, values=(64, 128), label="vocab", short="vocabulary", in_model=True, applies=can_enlarge_vocabulary,
        numerics="the model itself has more tokens than its tokenizer: more parameters, and a softmax over more logits",
        meaning="the model's own vocabulary, enlarged to a multiple",
    )  # fmt: skip
    quantized_weights: str = knob(
        off="off", values=("on",), label="qw", short="quant. weights", applies=gathers_on_gpus,
        writes=lambda value: zero(zero_quantized_weights=True),
        numerics="the parameters that ZeRO-3 gathers are rounded to 8 bits on their way",
        meaning="parameters are gathered in 8 bits (`zero_quantized_weights`)",
    )  # fmt: skip

    @property
    def name(self) -> str:
        """As DeepSpeed's autotuner names it, such as `z1_gas2_tmbspg4`; knobs that are off are left out."""
        parts = [f"z{self.zero_stage}", *(KNOBS[field].words(value) for field, value in self.knobs_on.items())]
        return "_".join([*parts, f"gas{self.gradient_accumulation_steps}", f"tmbspg{self.micro_batch_size}"])

    @property
    def knobs_on(self) -> dict[str, Any]:
        """The knobs that are not off, with their values."""
        values = {field: getattr(self, field) for field in KNOBS}
        return {field: value for field, value in values.items() if value != KNOBS[field].off}

    @property
    def model_knobs(self) -> dict[str, Any]:
        """Knobs that are on and that the training script has to apply: DeepSpeed's file cannot say them."""
        return {field: value for field, value in self.knobs_on.items() if KNOBS[field].in_model}

    def trained_dtype(self, dtype: str) -> str:
        """The precision it trains in, where the workload's is `dtype`."""
        return dtype if self.precision == KNOBS["precision"].off else self.precision

    def global_batch_size(self, ranks: int) -> int:
        """Samples in one optimizer step over `ranks` ranks."""
        return self.micro_batch_size * self.gradient_accumulation_steps * ranks

    def to_json(self) -> dict[str, Any]:
        """The three that every configuration has, and the knobs that are on."""
        return {field: getattr(self, field) for field in CORE_FIELDS} | self.knobs_on

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        return cls(**document)


CORE_FIELDS = ("zero_stage", "micro_batch_size", "gradient_accumulation_steps")

KNOBS: dict[str, Knob] = {
    field.name: field.metadata["knob"] for field in dataclasses.fields(TrialConfig) if "knob" in field.metadata
}
"""Every knob by its field, in the order of names and columns."""


def has_meaning(field: str, config: Mapping[str, Any], context: KnobContext) -> bool:
    """Whether a knob that is on does something.

    Args:
        config: fields of a `TrialConfig`, the knob's own among them.
    """
    return field not in context.out_of_reach and KNOBS[field].applies(config, context)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A trial that ran: the slowest rank's step times, and the largest memory figures over all ranks."""

    step_seconds: tuple[float, ...]
    """Seconds of each timed whole optimizer step, data loading included, on the slowest rank. Where a step was put
    together from parts, the one estimate that they make."""
    samples_per_second: float
    """`ranks × micro_batch_size × gradient_accumulation_steps / mean(step_seconds)`."""
    samples_per_second_ci95: tuple[float, float]
    tokens_per_second: float | None = None
    """Tokens of all ranks, padding apart, over the seconds that their steps took; None where they were not counted.
    Where they were, `samples_per_second` is this over the mean tokens of a sample, and `step_seconds` are for as many
    tokens as a whole batch of such samples has."""
    forward_seconds: float
    """Mean seconds a step spends between the start and the end of its forward passes, likewise below."""
    backward_seconds: float
    optimizer_seconds: float
    deepspeed_samples_per_second: float | None
    """Figure of DeepSpeed's own ThroughputTimer: forward to step, without data loading. For comparison only."""
    warmup_step_seconds: tuple[float, ...]
    """Seconds of each warm-up step; with many micro-steps, it has only some (`StepPlan.warmup_micro_steps`)."""
    first_steps_seconds: float = 0.0
    """Seconds that the warm-up took beyond as many later micro-steps: compilation, for the most part."""
    skipped_steps: int
    """Steps that fp16 overflow skipped; they are never among `step_seconds`."""
    stopped_early: bool = False
    """Timing was given up because the configuration is clearly slower than the study's best."""
    from_parts: StepParts | None = None
    """Seconds of the micro-steps that `step_seconds` was put together from; None where whole steps were timed."""
    from_micro_steps: int = 0
    """Above zero, in records of earlier versions only: the trial was given up before a step was whole. `step_seconds`
    holds one estimate, made from so many micro-steps without the optimizer, and the memory figures are those of what
    ran."""
    drifting: bool = False
    """The steps were still getting faster or slower when their budget ended: take the figure with care."""
    peak_memory_bytes: int
    reserved_memory_bytes: int
    alloc_retries: int
    """Times the caching allocator had to flush its cache and try again: above zero, memory was tight."""
    setup_seconds: float
    """From the launch of the rank processes until the engine stood ready."""
    wall_seconds: float
    """The whole trial as the tuner's clock saw it."""
    model_parameters: int
    flops_per_sample: float
    """Model FLOPs of one sample, forward and backward: seq_len × (6N + 12·L·h·s) (PaLM, appendix B)."""

    def to_json(self) -> dict[str, Any]:
        return {"type": "measurement", **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        fields = {key: value for key, value in document.items() if key != "type"}
        for key in ("step_seconds", "samples_per_second_ci95", "warmup_step_seconds"):
            fields[key] = tuple(fields[key])
        if fields.get("from_parts") is not None:
            fields["from_parts"] = StepParts.from_json(fields["from_parts"])
        return cls(**fields)


class FailureKind(enum.StrEnum):
    """Why a trial gave no measurement. `objectives.running.failures` is the only place that decides it."""

    OUT_OF_MEMORY = "out_of_memory"
    INVALID_CONFIG = "invalid_config"
    TIMEOUT = "timeout"
    CRASH = "crash"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A trial that gave no measurement, with what a person needs to see why."""

    kind: FailureKind
    message: str
    phase: str
    """Where it struck: start, model, engine, data, forward, backward or step."""
    rank: int | None = None
    peak_memory_bytes: int | None = None
    log_tail: str = ""
    wall_seconds: float = 0.0
    raised: str = ""
    """What a person's script raised, and where: `IndexError in _init_weights, train.py:9`."""

    def to_json(self) -> dict[str, Any]:
        return {"type": "failure", **dataclasses.asdict(self), "kind": self.kind.value}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        fields = {key: value for key, value in document.items() if key != "type"}
        return cls(**{**fields, "kind": FailureKind(fields["kind"])})


Outcome: TypeAlias = Measurement | Failure


class Provenance(enum.StrEnum):
    """Where the figures of outcomes come from. Figures of different kinds are never mixed, and those that were not
    measured carry the word wherever they are shown."""

    MEASURED = "measured"
    """Ranks trained for them."""
    SIMULATED = "simulated"
    """By a model of the hardware, with noise."""
    REPLAYED = "replayed"
    """Measured once, and read from a recording."""

    def mark(self, text: str) -> str:
        """A heading or a figure with the word behind it, such as `samples/s, replayed`; measured ones need none."""
        return text if self is Provenance.MEASURED else f"{text}, {self.value}"


def outcome_from_json(document: Mapping[str, Any]) -> Outcome:
    """Reads what `Measurement.to_json` or `Failure.to_json` wrote.

    Raises:
        ValueError: the document's `type` is neither.
    """
    match document.get("type"):
        case "measurement":
            return Measurement.from_json(document)
        case "failure":
            return Failure.from_json(document)
        case other:
            raise ValueError(f"an outcome is a measurement or a failure, not {other!r}")
