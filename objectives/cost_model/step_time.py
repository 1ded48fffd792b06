"""Seconds of one whole optimizer step, part by part.

Compute saturates: below some tokens the host cannot launch kernels fast enough. Above, matrix products reach a fraction
of the peak, and what is between them moves its tensors at the memory's bandwidth: the two terms of the roofline
(Williams et al. 2009), added, as neither hides the other. Communication follows ZeRO's volumes; what overlaps with
compute is hidden. Only a prior: the study's own measurements correct it (`objectives.cost_model.calibration`).
"""

import dataclasses

from ds_tune.objectives.cost_model.architecture import Architecture
from ds_tune.objectives.cost_model.hardware import Hardware
from ds_tune.objectives.cost_model.memory import tensors_of_a_block
from ds_tune.objectives.trial import TrialConfig


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepConstants:
    """What no data sheet says: from probes on H200s, unless it says otherwise (docs/cost-model.md)."""

    efficiency: float = 0.554
    """Fraction of the peak that matrix products reach. This, the traffics and the gaps are fitted to whole studies on
    H100s and H200s, whose memories' bandwidth differs (benchmarks/rate_model.py)."""
    single_efficiency: float = 0.85
    """The same in fp32, assumed: with the traffic, compute as a whole then reaches 75% of a V100's peak."""
    traffic: float = 10.3
    """Times that the tensors which a block keeps go through memory, forward and backward pass together."""
    compiled_traffic: float = 6.1
    """The same where blocks are compiled, and keep less."""
    gap_seconds: float = 0.3e-3
    """Of a micro-step, for each block: the GPU's, between kernels and in those too small to fill it."""
    dropout_cost: float = 0.08
    """Of the compute: drawing its random numbers. 41.2 samples/s without on an H100, 38.3 with it."""
    launch_seconds: float = 2.2e-3
    """Of a micro-step, for each block's forward and backward pass, however small the batch: GPT-2's, or BERT's."""
    rms_norm_launch_factor: float = 1.4
    """Of that, for Llama's: transformers' RMSNorm and rotated positions are many small kernels. 3.1 ms on an H100."""
    relative_launch_factor: float = 2.6
    """Of that, for DeBERTa's relative positions: 5.7 ms on an H100."""
    checkpoint_seconds: float = 3e-3
    """Of a micro-step, for each checkpointed block, besides the forward pass's kernels: random numbers' state is saved
    and put back, and its backward pass is a graph of its own. 2 to 7 ms on each of eight machines and models."""
    zero3_matrix_seconds: float = 2e-3
    """Of a micro-step under ZeRO-3, for each matrix of a block: hooks around its module, and having it gathered. 1.7 to
    2.8 ms on single H100s and an H200, with five models."""
    zero3_gather_seconds: float = 1e-3
    """The same for what goes to other ranks: 0.6 ms with Llama, 1.2 to 1.6 ms with GPT2-xl, on two H100s."""
    gradient_hook_seconds: float = 0.3e-3
    """Of a micro-step under ZeRO-1 and 2, for each block: a hook copies every gradient as it appears. 12 ms for GPT2-xl
    on an H100, 25 ms on two H200s, of which a collective takes a part."""
    optimizer_bytes: float = 130.0
    """Moved for each parameter of a shard, clipping and copies included."""
    optimizer_launch_seconds: float = 0.9e-3
    """Of an optimizer step, for each block's tensors, however small."""
    link_efficiency: float = 0.4
    """Of the link's data-sheet figure that a collective reaches."""
    collective_seconds: float = 2e-3
    """Of a step's collectives however small, a rank more or less."""
    zero2_reduction: float = 1.5
    """ZeRO-2's reduction to each bucket's owner, in passes of all parameters over the ring."""
    zero2_owner_seconds: float = 2e-3
    """Of a micro-step under ZeRO-2, for each rank: its share of every bucket is a collective of its own. From the six
    published models on 16 V100s whose ZeRO-2 was timed: 6 to 18% slower than ZeRO-1 in all of them."""
    zero3_overlap: float = 0.3
    """Of ZeRO-3's communication that hides behind compute; the other stages' does not, by default."""
    compiled_launch_factor: float = 0.7
    """Of the time to launch its kernels: fewer of them. 76 ms a micro-step of GPT2-xl beside an H200."""
    odd_vocabulary_cost: float = 1.8
    """How much longer than its share of the FLOPs an output projection takes whose columns are no multiple of 64."""
    timer_seconds: float = 1.5e-3
    """Of a micro-step: what it costs that DeepSpeed's throughput timer waits for the GPU. Assumed, not yet measured."""
    eager_factor: float = 1.15
    """Of attention written out, on the whole of the compute."""
    host_bandwidth: float = 40e9
    """Bytes a second of an optimizer step on the host, and over the bus to it: 45e9 beside one H100, on 16 cores."""
    quantized_width: float = 0.5
    """Of the bytes of gathered weights that ZeRO++ still sends: 8 bits of 16."""
    overlapped: float = 0.4
    """Of ZeRO-1's and 2's communication that hides behind compute under `overlap_comm`."""
    zero3_compute_factor: float = 1.06
    """What gathering and freeing parameters adds to a large micro-batch."""


CPU_CONSTANTS = StepConstants(
    efficiency=1.0,
    single_efficiency=1.0,
    traffic=0.0,  # small matrices: their products are what the memory bounds
    compiled_traffic=0.0,
    gap_seconds=0.0,
    dropout_cost=0.0,
    gradient_hook_seconds=0.0,
    launch_seconds=3e-3,
    checkpoint_seconds=0.0,
    zero3_gather_seconds=0.0,
    optimizer_bytes=60.0,
    link_efficiency=0.3,
    zero3_overlap=0.0,
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepEstimate:
    """Predicted seconds of one optimizer step."""

    compute: float
    launch: float
    """What the host needs to launch the step; hidden where compute takes longer."""
    hooks: float = 0.0
    """What ZeRO's handling of gradients adds to the longer of the two."""
    communication: float
    """What of the communication is not hidden."""
    optimizer: float
    samples: int
    """Of all ranks."""

    @property
    def seconds(self) -> float:
        return _at_least(self.compute, self.launch) + self.hooks + self.communication + self.optimizer

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds

    @property
    def launch_share(self) -> float:
        """How much of the step's relative change a relative change of the launch time makes."""
        both = _at_least(self.compute, self.launch)
        return (self.launch / both) ** 3 * self.launch / self.seconds

    @property
    def bottleneck(self) -> str:
        """What takes the most: compute, launch, communication or optimizer."""
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
    accelerator, ranks, stage = hardware.accelerator, hardware.ranks, config.zero_stage
    width = 4 if dtype == "fp32" else 2
    micro_steps = config.gradient_accumulation_steps
    checkpointed = 1 / config.activation_checkpointing if config.activation_checkpointing else 0.0
    recomputed = checkpointed / 3  # the forward pass is a third of both
    efficiency = constants.single_efficiency if dtype == "fp32" else constants.efficiency
    flops = config.micro_batch_size * architecture.flops_per_sample(seq_len)
    # The output projection is in no block: none of it is computed again.
    of_projection = config.micro_batch_size * seq_len * 6 * architecture.vocabulary * architecture.hidden
    flops += recomputed * (flops - of_projection)
    products = flops / (efficiency * accelerator.peak_flops(dtype))
    launch = constants.launch_seconds
    on_gpu = hardware.device == "cuda"
    compiled = config.compile != "off" and on_gpu
    if compiled:
        launch *= constants.compiled_launch_factor
    else:
        launch *= constants.rms_norm_launch_factor if architecture.rms_norm else 1.0
        launch *= constants.relative_launch_factor if architecture.relative_columns else 1.0
    if stage == 3 and config.compile != "deepcompile":  # which has no hooks
        of_a_matrix = constants.zero3_matrix_seconds + (constants.zero3_gather_seconds if ranks > 1 else 0.0)
        launch += architecture.block_matrices * of_a_matrix
    launch = launch * (1 + recomputed) + constants.checkpoint_seconds * checkpointed
    launch *= architecture.layers * accelerator.launch_factor
    projection = architecture.vocabulary * architecture.hidden / architecture.parameters
    is_odd = architecture.vocabulary % 64 != 0
    if is_odd and (config.padded_vocabulary or config.vocabulary) and on_gpu:
        products *= max(1 - constants.odd_vocabulary_cost * projection, 0.5)
    spared = architecture.dropout and config.dropout == "none"
    block = dataclasses.replace(architecture, dropout=architecture.dropout and not spared)
    kept = tensors_of_a_block(block, seq_len=seq_len, width=width, attention="sdpa", compiled=compiled)
    moved = kept * width * config.micro_batch_size * seq_len * architecture.hidden * architecture.layers
    moved *= (constants.compiled_traffic if compiled else constants.traffic) * (1 + recomputed)
    compute = products + moved / accelerator.memory_bandwidth
    compute += architecture.layers * constants.gap_seconds * (1 + recomputed)
    if spared:
        compute /= 1 + constants.dropout_cost
    if config.loss_computation == "chunked":
        compute *= 1 + projection / 3  # the backward pass makes the logits again
    if config.attention == "eager":
        compute *= constants.eager_factor
    if config.throughput_timer == "off" and on_gpu:
        compute = max(compute - constants.timer_seconds, 0.98 * compute)
    if stage == 3:
        compute *= constants.zero3_compute_factor
    shard = architecture.parameters / (1 if stage == 0 else ranks)
    optimizer = architecture.layers * constants.optimizer_launch_seconds * accelerator.launch_factor
    optimizer += constants.optimizer_bytes * shard / accelerator.memory_bandwidth
    offloaded = {"cpu": 1.0, "cpu_half": 0.5}.get(config.offload_optimizer, 0.0)
    # fp32 states read and written by the host, gradients and parameters over the bus.
    optimizer += offloaded * (28 + 2 * width) * shard / constants.host_bandwidth
    hooks = 0.0
    if stage in (1, 2):
        hooks = constants.gradient_hook_seconds * architecture.layers * accelerator.launch_factor
    communication = 0.0
    if stage >= 2:
        # Each micro-step but the last adds its gradients to those in the host's memory: to the GPU and back.
        communication += offloaded * (micro_steps - 1) * 2 * width * shard / constants.host_bandwidth
    if config.offload_parameters == "cpu":
        # Over the bus for the forward and again for the backward pass.
        communication += 2 * micro_steps * width * shard / constants.host_bandwidth
    if ranks > 1:
        # One pass of all parameters over the ring, as a reduce-scatter or an all-gather.
        once = width * architecture.parameters * (ranks - 1) / ranks
        once = once / (constants.link_efficiency * accelerator.link_bandwidth) + constants.collective_seconds
        gathered = (constants.quantized_width if config.quantized_weights == "on" else 1.0) * once
        # For the backward pass within a group of ranks, if there are groups.
        again = gathered * (1 - 1 / (config.parameter_group or ranks)) / (1 - 1 / ranks)
        between = {
            0: 2 * once,
            1: 2 * once,
            2: (micro_steps * constants.zero2_reduction + 1) * once,
            3: micro_steps * (gathered + again + once) * (1 - constants.zero3_overlap),
        }[stage]
        if stage == 2:
            between += micro_steps * ranks * constants.zero2_owner_seconds * accelerator.launch_factor
        if stage in (1, 2) and config.overlap_comm == "on":
            between *= 1 - constants.overlapped
        communication += between
    return StepEstimate(
        compute=micro_steps * compute,
        launch=micro_steps * launch,
        hooks=micro_steps * hooks,
        communication=communication,
        optimizer=optimizer,
        samples=config.global_batch_size(ranks),
    )


def _at_least(one: float, other: float) -> float:
    """The larger of two that hide each other, rounded where they are level (a 4-norm)."""
    return float((one**4 + other**4) ** 0.25)
