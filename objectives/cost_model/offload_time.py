"""Seconds of an optimizer step for what lives in the host's memory: its updates, and the way over the bus."""

from ds_tune.objectives.cost_model.step_inputs import StepInputs

HOST_BANDWIDTH = 40e9
"""Bytes a second of an optimizer step on the host, and over the bus to it: 45e9 beside one H100, on 16 cores."""
HOST_STATE_BYTES = 28
"""Bytes of fp32 states for each parameter that the host reads and writes."""


def host_update_seconds(step: StepInputs) -> float:
    """Seconds of the host in an optimizer step: its states, and gradients and parameters over the bus."""
    moved_bytes = (HOST_STATE_BYTES + 2 * step.bytes_per_element) * step.shard
    return step.offloaded_share * moved_bytes / HOST_BANDWIDTH


def offloaded_gradient_seconds(step: StepInputs) -> float:
    """Seconds over the bus, there and back: each micro-step but the last adds its gradients to those on the host."""
    if step.stage < 2:
        return 0.0
    moved_bytes = 2 * (step.config.gradient_accumulation_steps - 1) * step.bytes_per_element * step.shard
    return step.offloaded_share * moved_bytes / HOST_BANDWIDTH


def offloaded_parameter_seconds(step: StepInputs) -> float:
    """Seconds over the bus of parameters in the host's memory, for the forward and again for the backward pass."""
    if step.config.offload_parameters != "cpu":
        return 0.0
    share = step.architecture.parameters / step.hardware.ranks
    return 2 * step.config.gradient_accumulation_steps * step.bytes_per_element * share / HOST_BANDWIDTH
