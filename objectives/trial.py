"""What a trial is asked (`TrialConfig`) and what it answers (`Outcome = Measurement | Failure`).

Every type is frozen and turns into JSON and back without loss. In JSON an outcome carries its type in the
key `type`, so that a reader never has to guess from which keys are present.
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, Self, TypeAlias


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrialConfig:
    """One point of the search space; enough, beside the workload, to launch a trial."""

    zero_stage: int
    micro_batch_size: int
    """Samples a rank takes through one forward and backward pass."""
    gradient_accumulation_steps: int

    @property
    def name(self) -> str:
        """The name DeepSpeed's autotuner gives to the same configuration, such as `z1_gas2_tmbspg4`."""
        return f"z{self.zero_stage}_gas{self.gradient_accumulation_steps}_tmbspg{self.micro_batch_size}"

    def global_batch_size(self, ranks: int) -> int:
        """Samples in one optimizer step over `ranks` ranks."""
        return self.micro_batch_size * self.gradient_accumulation_steps * ranks

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        return cls(**document)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A trial that ran: the slowest rank's step times, and the largest memory figures over all ranks."""

    step_seconds: tuple[float, ...]
    """Seconds of each timed whole optimizer step, data loading included, on the slowest rank."""
    samples_per_second: float
    """`ranks × micro_batch_size × gradient_accumulation_steps / mean(step_seconds)`."""
    samples_per_second_ci95: tuple[float, float]
    forward_seconds: float
    """Mean seconds a step spends between the start and the end of its forward passes, likewise below."""
    backward_seconds: float
    optimizer_seconds: float
    deepspeed_samples_per_second: float | None
    """What DeepSpeed's own ThroughputTimer says: forward to step, without data loading. For comparison only."""
    warmup_step_seconds: tuple[float, ...]
    skipped_steps: int
    """Steps that fp16 overflow skipped; they are never among `step_seconds`."""
    stopped_early: bool = False
    """Timing was given up because the configuration is clearly slower than the study's best."""
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
        return cls(**fields)


class FailureKind(enum.StrEnum):
    """Why a trial gave no measurement. `objectives.failures` is the only place that decides it."""

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

    def to_json(self) -> dict[str, Any]:
        return {"type": "failure", **dataclasses.asdict(self), "kind": self.kind.value}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        fields = {key: value for key, value in document.items() if key != "type"}
        return cls(**{**fields, "kind": FailureKind(fields["kind"])})


Outcome: TypeAlias = Measurement | Failure


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
