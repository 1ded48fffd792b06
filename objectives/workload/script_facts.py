"""What a run of a person's script as it stands showed of it, as plain values."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

TRAINER, ACCELERATE, PLAIN = "Trainer", "Accelerate", "DeepSpeed"
"""Who owns the training loop, the last one the script itself."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScriptFacts:
    """What a run of the script as it stands showed."""

    loop: str
    """`TRAINER`, `ACCELERATE` or `PLAIN`."""
    ds_config: Mapping[str, Any]
    """The DeepSpeed configuration as the person wrote it, values `"auto"` and all."""
    zero_stage: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    dtype: str
    parameters: int
    trainable_parameters: int
    model: Mapping[str, Any] | None
    """Configuration of the model in transformers' JSON form; None where it has none."""
    samples_per_micro_batch: int
    """Rows of the batches that it fed."""
    tokens_per_sample: int | None
    """Tokens that are computed for a sample, padding included; None where samples differed, or have no tokens."""
    loader_follows: bool
    """Its data comes from the loader that DeepSpeed makes, in micro-batches of DeepSpeed's configuration."""
    micro_batch_flag: str | None = None
    """Option of the script whose value was the micro-batch size."""
    accumulation_flag: str | None = None
    engines: int = 1
    """DeepSpeed engines that it made; of those that train the first one is meant."""
    initialized_at: str = ""
    """File and line of the script that led to `deepspeed.initialize`."""
    model_knobs: tuple[str, ...] = ()
    """Knobs of the model that the live one can be given."""
    checkpoints_activations: bool = False
    """Whether the script has activation checkpointing on."""
    adapter_inputs: float = 0.0
    """See `ParameterCounts`."""
    prepare_seconds: float = 0.0
    """Seconds from its start to the engine, the imports of torch and Hugging Face's libraries not counted."""
    mean_tokens_per_sample: float | None = None
    """Mean tokens of a sample, padding apart; None where samples are counted: they have none, what is padding cannot be
    told, or an earlier version learned this."""
    shortest_sample: int | None = None
    """Fewest tokens that a sample was seen to have, padding apart, likewise below; None where samples are packed."""
    longest_sample: int | None = None
    padding_share: float = 0.0
    """Fraction of the tokens computed that is padding."""
    is_packed: bool = False
    """Samples are put into one row, however many a micro-batch has."""

    @property
    def lengths_differ(self) -> bool:
        """Whether samples differ in length, so that tokens are the measure."""
        return self.mean_tokens_per_sample is not None and (
            self.is_packed or self.shortest_sample != self.longest_sample
        )

    @property
    def counting(self) -> str:
        """What is counted in place of samples, in words; empty where it is samples."""
        if not self.lengths_differ:
            return ""
        seen = "packed into one row" if self.is_packed else f"{self.shortest_sample}–{self.longest_sample} seen"
        padding = f"{self.padding_share:.0%} of what is computed is padding" if self.padding_share else "no padding"
        return (
            f"{self.mean_tokens_per_sample:.0f} tokens a sample ({seen}), {padding}; "
            "tokens, padding apart, are what is counted"
        )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        return cls(**{**document, "model_knobs": tuple(document.get("model_knobs", ()))})
