"""`StepInputs`: an optimizer step to predict, as every term of `step_time` takes it, and the constants that vary."""

import dataclasses

from ds_tune.objectives.cost_model.architecture import Architecture
from ds_tune.objectives.cost_model.hardware import Hardware
from ds_tune.objectives.cost_model.memory import OFFLOADED_SHARE, bytes_per_element
from ds_tune.objectives.trial import TrialConfig


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepConstants:
    """Constants that differ between GPUs and CPUs, or are fitted to studies; all others stand beside their term.

    `efficiency`, both traffics and `gap_seconds` are fitted together to whole studies on H100s and H200s, which differ
    in their memories' bandwidth (`benchmarks/rate_model.py --fit`); the rest is from probes on H200s.
    """

    efficiency: float = 0.554
    """Fraction of the half-precision peak that matrix products reach."""
    single_efficiency: float = 0.85
    """Fraction of the fp32 peak. Assumed: with the traffic, compute as a whole then reaches 75% of a V100's peak."""
    traffic: float = 10.3
    """Times that the tensors which a block keeps go through memory, forward and backward pass together."""
    compiled_traffic: float = 6.1
    """Traffic of blocks that are compiled, and keep less."""
    gap_seconds: float = 0.3e-3
    """Seconds a block and micro-step that a GPU spends between kernels, and in those too small to fill it."""
    launch_seconds: float = 2.2e-3
    """Seconds a block and micro-step to launch the kernels of GPT-2 or BERT, however small the batch."""
    optimizer_bytes: float = 130.0
    """Bytes moved for each parameter of a shard in an optimizer step, clipping and copies included."""
    optimizer_launch_seconds: float = 0.9e-3
    """Seconds an optimizer step for each block's tensors, however small."""
    link_efficiency: float = 0.4
    """Fraction of data-sheet link bandwidth that a collective achieves."""
    zero2_owner_seconds: float = 2e-3
    """Seconds a micro-step under ZeRO-2 for each rank: its share of every bucket is a collective of its own. From the
    six published models on 16 V100s whose ZeRO-2 was timed: 6 to 18% slower than ZeRO-1 in all of them."""


CPU_CONSTANTS = StepConstants(
    efficiency=1.0,
    single_efficiency=1.0,
    traffic=0.0,  # small matrices: their products are what the memory bounds
    compiled_traffic=0.0,
    gap_seconds=0.0,
    launch_seconds=3e-3,
    optimizer_bytes=60.0,
    link_efficiency=0.3,
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """An optimizer step to predict, as every term takes it."""

    config: TrialConfig
    architecture: Architecture
    hardware: Hardware
    seq_len: int
    dtype: str
    constants: StepConstants

    @property
    def stage(self) -> int:
        return self.config.zero_stage

    @property
    def is_on_gpu(self) -> bool:
        return self.hardware.device == "cuda"

    @property
    def is_compiled(self) -> bool:
        return self.config.compile != "off" and self.is_on_gpu

    @property
    def drops_dropout(self) -> bool:
        return self.architecture.dropout and self.config.dropout == "none"

    @property
    def checkpointed_share(self) -> float:
        """Fraction of the blocks that are checkpointed."""
        every = self.config.activation_checkpointing
        return 1 / every if every else 0.0

    @property
    def passes(self) -> float:
        """Forward and backward passes of a block, those that checkpointing repeats included: the forward is a third."""
        return 1 + self.checkpointed_share / 3

    @property
    def projection_share(self) -> float:
        """Fraction of what a token is multiplied with, and so of the FLOPs, that is the output projection."""
        return self.architecture.vocabulary * self.architecture.hidden / self.architecture.parameters_per_token

    @property
    def shard(self) -> float:
        """Parameters that one rank's optimizer updates."""
        return self.architecture.trained_parameters / (1 if self.stage == 0 else self.hardware.ranks)

    @property
    def bytes_per_element(self) -> int:
        return bytes_per_element(self.dtype)

    @property
    def offloaded_share(self) -> float:
        return OFFLOADED_SHARE.get(self.config.offload_optimizer, 0.0)
