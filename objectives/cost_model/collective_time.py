"""Seconds of collectives between ranks in an optimizer step, by ZeRO's volumes (Rajbhandari et al. 2020, section 7)."""

from ds_tune.objectives.cost_model.step_inputs import StepInputs

OVERLAPPED = 0.4
"""Fraction of ZeRO-1's and ZeRO-2's communication that hides behind compute under `overlap_comm`, off by default."""


def collective_seconds(step: StepInputs) -> float:
    """Seconds of collectives between ranks that compute does not hide (ZeRO, Rajbhandari et al. 2020, section 7)."""
    if step.hardware.ranks == 1:
        return 0.0
    if step.stage == 3:
        return _zero3_collective_seconds(step)
    # Gradients are reduced to their owners or to all, and what comes of them gathered.
    seconds = _zero2_collective_seconds(step) if step.stage == 2 else 2 * _ring_pass_seconds(step)
    return seconds * (1 - OVERLAPPED if step.stage in (1, 2) and step.config.overlap_comm == "on" else 1.0)


COLLECTIVE_SECONDS = 2e-3
"""Seconds of a step's collectives however small, a rank more or less."""


def _ring_pass_seconds(step: StepInputs, *, of_all: bool = False) -> float:
    """Seconds of one pass over the ring, as a reduce-scatter or an all-gather, of the parameters that are trained.

    Args:
        of_all: of the others as well.
    """
    ranks = step.hardware.ranks
    elements = step.architecture.parameters if of_all else step.architecture.trained_parameters
    moved_bytes = step.bytes_per_element * elements * (ranks - 1) / ranks
    bandwidth = step.constants.link_efficiency * step.hardware.link_bandwidth
    return moved_bytes / bandwidth + COLLECTIVE_SECONDS


ZERO2_REDUCTION_PASSES = 1.5
"""Passes over the ring of ZeRO-2's reduction to each bucket's owner."""


def _zero2_collective_seconds(step: StepInputs) -> float:
    """Seconds of a reduction in each micro-step and one gathering."""
    once, micro_steps = _ring_pass_seconds(step), step.config.gradient_accumulation_steps
    owners = step.hardware.ranks * step.constants.zero2_owner_seconds * step.hardware.accelerator.launch_factor
    return micro_steps * (ZERO2_REDUCTION_PASSES * once + owners) + once


QUANTIZED_SHARE = 0.5
"""Fraction of the bytes of gathered weights that ZeRO++ still sends: 8 bits of 16 (Wang et al. 2023)."""
ZERO3_OVERLAP = 0.3
"""Fraction of ZeRO-3's communication that hides behind compute on GPUs; the other stages' does not, by default."""


def _zero3_collective_seconds(step: StepInputs) -> float:
    """Seconds of two gatherings and a reduction in each micro-step."""
    once, ranks = _ring_pass_seconds(step), step.hardware.ranks
    gathered = (QUANTIZED_SHARE if step.config.quantized_weights == "on" else 1.0) * _ring_pass_seconds(
        step, of_all=True
    )
    # For the backward pass within a group of ranks, if there are groups.
    again = gathered * (1 - 1 / (step.config.parameter_group or ranks)) / (1 - 1 / ranks)
    seconds = step.config.gradient_accumulation_steps * (gathered + again + once)
    return seconds * (1 - ZERO3_OVERLAP if step.is_on_gpu else 1.0)
