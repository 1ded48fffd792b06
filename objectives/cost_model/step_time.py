"""Seconds of one whole optimizer step: a sum of named terms, each a function with its constants beside it.

Compute saturates: below some tokens the host cannot launch kernels fast enough. Communication follows ZeRO's volumes;
what overlaps with compute is hidden. Only a prior: the study's own measurements correct it
(`objectives.cost_model.calibration`). docs/cost-model.md has the table of terms.
"""

import dataclasses

from ds_tune.objectives.cost_model.architecture import Architecture
from ds_tune.objectives.cost_model.collective_time import collective_seconds
from ds_tune.objectives.cost_model.compute_time import compute_seconds, update_seconds
from ds_tune.objectives.cost_model.hardware import Hardware
from ds_tune.objectives.cost_model.launch_time import gradient_hook_seconds, launch_seconds
from ds_tune.objectives.cost_model.offload_time import (
    host_update_seconds,
    offloaded_gradient_seconds,
    offloaded_parameter_seconds,
)
from ds_tune.objectives.cost_model.step_inputs import CPU_CONSTANTS, StepConstants, StepInputs
from ds_tune.objectives.trial import TrialConfig


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepEstimate:
    """Predicted seconds of one optimizer step."""

    compute: float
    launch: float
    """Seconds the host needs to launch the step's kernels; hidden where compute takes longer."""
    hooks: float = 0.0
    """Seconds that ZeRO's handling of gradients adds to the longer of the two."""
    communication: float
    """Seconds of communication that compute does not hide."""
    optimizer: float
    samples: int
    """Samples of all ranks."""

    @property
    def seconds(self) -> float:
        return _at_least(self.compute, self.launch) + self.hooks + self.communication + self.optimizer

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds

    @property
    def launch_share(self) -> float:
        """Relative change of the step for a relative change of the launch time."""
        both = _at_least(self.compute, self.launch)
        return (self.launch / both) ** 3 * self.launch / self.seconds

    @property
    def bottleneck(self) -> str:
        """Name of the longest part: compute, launch, communication or optimizer."""
        parts = {
            "compute": self.compute,
            "launch": self.launch if self.launch > self.compute else 0.0,
            "communication": self.communication,
            "optimizer": self.optimizer,
        }
        return max(parts, key=lambda name: parts[name])


def predict_step(
    config: TrialConfig,
    architecture: Architecture,
    hardware: Hardware,
    *,
    seq_len: int,
    dtype: str,
    constants: StepConstants | None = None,
) -> StepEstimate:
    """Predicted seconds of one optimizer step on the slowest rank.

    Args:
        dtype: `fp16`, `bf16` or `fp32`.
    """
    constants = constants or (CPU_CONSTANTS if hardware.device == "cpu" else StepConstants())
    step = StepInputs(
        config=config,
        architecture=architecture,
        hardware=hardware,
        seq_len=seq_len,
        dtype=dtype,
        constants=constants,
    )
    micro_steps = config.gradient_accumulation_steps
    return StepEstimate(
        compute=micro_steps * compute_seconds(step),
        launch=micro_steps * launch_seconds(step),
        hooks=micro_steps * gradient_hook_seconds(step),
        communication=collective_seconds(step) + offloaded_gradient_seconds(step) + offloaded_parameter_seconds(step),
        optimizer=update_seconds(step) + host_update_seconds(step),
        samples=config.global_batch_size(hardware.ranks),
    )


def _at_least(one: float, other: float) -> float:
    """The larger of two that hide each other, rounded where they are level (a 4-norm)."""
    return float((one**4 + other**4) ** 0.25)
