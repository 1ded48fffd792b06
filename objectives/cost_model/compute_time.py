"""Seconds that a device computes: of a micro-step, and of the optimizer's update.

Matrix products reach a fraction of the peak, and what is between them moves its tensors at the memory's bandwidth: the
two terms of the roofline (Williams et al. 2009), added, as neither hides the other.
"""

import dataclasses

from ds_tune.objectives.cost_model.block_tensors import tensors_of_a_block
from ds_tune.objectives.cost_model.step_inputs import StepInputs

DROPOUT_COST = 0.08
"""Fraction that drawing dropout's random numbers adds to compute on a GPU. On an H100 41.2 samples/s without, 38.3 with
it."""
EAGER_FACTOR = 1.15
"""Factor on compute of attention written out."""
ZERO3_COMPUTE_FACTOR = 1.06
"""Factor on compute of gathering and freeing parameters, with a large micro-batch."""


def compute_seconds(step: StepInputs) -> float:
    """Seconds of a micro-step's forward and backward pass, had the host no part in it."""
    seconds = _matrix_product_seconds(step) + _memory_traffic_seconds(step) + _kernel_gap_seconds(step)
    if step.drops_dropout and step.is_on_gpu:
        seconds /= 1 + DROPOUT_COST
    if step.config.loss_computation == "chunked":
        seconds *= 1 + step.projection_share / 3  # the backward pass makes the logits again
    if step.config.attention == "eager":
        seconds *= EAGER_FACTOR
    return seconds * (ZERO3_COMPUTE_FACTOR if step.stage == 3 else 1.0)


ODD_VOCABULARY_COST = 1.8
"""Share of the time over share of the FLOPs, of an output projection whose columns are no multiple of 64."""


def _matrix_product_seconds(step: StepInputs) -> float:
    """Seconds of matrix products, which reach a fraction of the peak."""
    config, architecture, constants = step.config, step.architecture, step.constants
    flops = config.micro_batch_size * architecture.flops_per_sample(step.seq_len)
    # The output projection is in no block: none of it is computed again.
    products = 4 if architecture.is_frozen else 6
    of_projection = config.micro_batch_size * step.seq_len * products * architecture.vocabulary * architecture.hidden
    flops = of_projection + step.passes * (flops - of_projection)
    efficiency = constants.single_efficiency if step.dtype == "fp32" else constants.efficiency
    seconds = flops / (efficiency * step.hardware.accelerator.peak_flops(step.dtype))
    is_odd = architecture.vocabulary % 64 != 0
    if is_odd and (config.padded_vocabulary or config.vocabulary) and step.is_on_gpu:
        seconds *= max(1 - ODD_VOCABULARY_COST * step.projection_share, 0.5)
    return seconds


def _memory_traffic_seconds(step: StepInputs) -> float:
    """Seconds that tensors between the matrix products go through memory."""
    architecture, width = step.architecture, step.bytes_per_element
    block = dataclasses.replace(architecture, dropout=architecture.dropout and not step.drops_dropout)
    kept = tensors_of_a_block(block, seq_len=step.seq_len, width=width, attention="sdpa", compiled=step.is_compiled)
    tensor_bytes = width * step.config.micro_batch_size * step.seq_len * architecture.hidden
    times = step.constants.compiled_traffic if step.is_compiled else step.constants.traffic
    moved_bytes = times * step.passes * architecture.layers * kept * tensor_bytes
    return moved_bytes / step.hardware.accelerator.memory_bandwidth


def _kernel_gap_seconds(step: StepInputs) -> float:
    """Seconds between kernels, and in those too small to fill a GPU."""
    return step.architecture.layers * step.constants.gap_seconds * step.passes


def update_seconds(step: StepInputs) -> float:
    """Seconds of the device in an optimizer step: clipping, Adam and copies of a shard."""
    constants, accelerator = step.constants, step.hardware.accelerator
    launch = step.architecture.layers * constants.optimizer_launch_seconds * accelerator.launch_factor
    return launch + constants.optimizer_bytes * step.shard / accelerator.memory_bandwidth
