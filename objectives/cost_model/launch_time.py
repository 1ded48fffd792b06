"""Seconds that the host needs for a micro-step however small the batch: launching kernels, and ZeRO's hooks."""

from ds_tune.objectives.cost_model.step_inputs import StepInputs

CHECKPOINT_SECONDS = 3e-3
"""Seconds for each checkpointed block on a GPU, besides the forward pass's kernels: random numbers' state is saved and
put back, and its backward pass is a graph of its own. 2 to 7 ms on each of eight machines and models."""


def launch_seconds(step: StepInputs) -> float:
    """Seconds of the host to launch a micro-step's kernels."""
    of_a_block = step.passes * (_block_launch_seconds(step) + _module_hook_seconds(step))
    if step.is_on_gpu:
        of_a_block += step.checkpointed_share * CHECKPOINT_SECONDS
    return of_a_block * step.architecture.layers * step.hardware.accelerator.launch_factor


COMPILED_LAUNCH_FACTOR = 0.7
"""Factor of compiled blocks, which have fewer kernels. 76 ms a micro-step of GPT2-xl on an H200."""
RMS_NORM_LAUNCH_FACTOR = 1.4
"""Factor of Llama: transformers' RMSNorm and rotated positions are many small kernels. 3.1 ms on an H100."""
RELATIVE_LAUNCH_FACTOR = 2.6
"""Factor of DeBERTa's relative positions: 5.7 ms on an H100."""


def _block_launch_seconds(step: StepInputs) -> float:
    """Seconds to launch the kernels of one block's forward and backward pass."""
    seconds = step.constants.launch_seconds
    if step.is_compiled:
        return seconds * COMPILED_LAUNCH_FACTOR
    seconds *= RMS_NORM_LAUNCH_FACTOR if step.architecture.rms_norm else 1.0
    return seconds * (RELATIVE_LAUNCH_FACTOR if step.architecture.relative_columns else 1.0)


ZERO3_MATRIX_SECONDS = 2e-3
"""Seconds for each matrix of a block: hooks around its module, and having it gathered. 1.7 to 2.8 ms on single H100s
and an H200, with five models."""
ZERO3_GATHER_SECONDS = 1e-3
"""Seconds for each matrix more, on GPUs, for what goes to other ranks: 0.6 ms with Llama, 1.2 to 1.6 ms with GPT2-xl,
on two H100s."""


def _module_hook_seconds(step: StepInputs) -> float:
    """Seconds of ZeRO-3's hooks around the modules of one block. DeepCompile has none."""
    if step.stage != 3 or step.config.compile == "deepcompile":
        return 0.0
    has_peers = step.hardware.ranks > 1 and step.is_on_gpu
    return step.architecture.block_matrices * (ZERO3_MATRIX_SECONDS + (ZERO3_GATHER_SECONDS if has_peers else 0.0))


GRADIENT_HOOK_SECONDS = 0.3e-3
"""Seconds for each block on a GPU: a hook copies every gradient as it appears. 12 ms for GPT2-xl on an H100, 25 ms on
two H200s, of which a collective takes a part."""


def gradient_hook_seconds(step: StepInputs) -> float:
    """Seconds of ZeRO-1's and ZeRO-2's hooks in a micro-step."""
    if step.stage not in (1, 2) or not step.is_on_gpu:
        return 0.0
    return GRADIENT_HOOK_SECONDS * step.architecture.layers * step.hardware.accelerator.launch_factor
