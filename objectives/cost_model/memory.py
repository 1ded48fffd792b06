"""Bytes that a rank needs at its peak, part by part, from a `TrialConfig` and the model's sizes.

Two moments can be the peak: the start of the backward pass, when every activation is alive; and the optimizer step,
when activations are gone and DeepSpeed holds its gradients in fp32. What is kept of a block is counted tensor by
tensor (after Korthikanti et al. 2022, "Reducing Activation Recomputation", with what Hugging Face's models keep
besides); the states follow ZeRO (Rajbhandari et al. 2020) and DeepSpeed 0.19's optimizers.
"""

import dataclasses

from ds_tune.objectives.cost_model.architecture import Architecture
from ds_tune.objectives.knobs import LOSS_CHUNKS
from ds_tune.objectives.trial import TrialConfig

DEFAULT_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's `reduce_bucket_size`."""

LIVE_PARAMETER_ELEMENTS = 1_000_000_000
"""ZeRO-3 keeps at most so many gathered parameters (`stage3_max_live_parameters`)."""

SUB_GROUP_ELEMENTS = 1_000_000_000
"""ZeRO-3's optimizer takes so many at once (`sub_group_size`)."""

REUSE_ELEMENTS = 1_000_000_000
"""ZeRO-3 keeps what it needs again before it has used so many others (`stage3_max_reuse_distance`)."""

PREFETCH_ELEMENTS = 50_000_000
"""ZeRO-3 gathers so many ahead (`stage3_prefetch_bucket_size`)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConstants:
    """What no formula gives (docs/cost-model.md)."""

    fixed_bytes: float = 0.3e9
    """Workspaces and buffers that every configuration has."""
    process_bytes: float = 0.5e9
    """The same on a CPU, where the interpreter and its libraries count as well."""
    activation_factor: float = 1.0
    """Measured bytes of a sample over the tensors that were counted."""
    logit_bytes: float | None = None
    """Of each logit; None for what today's transformers keep."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Predicted bytes of one rank."""

    parameters: float
    gradients: float
    """Those that wait while another micro-step runs: none where there is only one."""
    optimizer_states: float
    gathered: float
    """Whole parameters that ZeRO-3 has from the other ranks, or from the host, where the backward pass begins."""
    buckets: float
    """Those that are there when the backward pass begins; other stages make theirs, and let go of them, within it."""
    activations: float
    """Of one micro-batch, logits and loss not counted."""
    logits: float
    """What is kept of them for the loss, and their gradients."""
    recomputed_block: float
    """What a checkpointed block holds while it is computed again, when the logits are gone."""
    step_transient: float
    """What the optimizer step holds besides parameters and states."""
    large_in_backward: float
    """Of what is there when the backward pass begins or soon after, that which a few tensors make up: the logits in the
    loss's precision, and the bucket in which gradients are reduced."""
    large_in_step: float
    """The same in the optimizer step: the gradients in fp32, flattened."""
    fixed: float

    @property
    def states_bytes(self) -> float:
        return self.parameters + self.optimizer_states

    @property
    def backward_bytes(self) -> float:
        """At the start of the backward pass."""
        return self.states_bytes + self.gradients + self.gathered + self.buckets + self.fixed + self.batch_bytes

    @property
    def batch_bytes(self) -> float:
        """What grows with the micro-batch."""
        return self.activations + max(self.logits, self.recomputed_block)

    @property
    def step_bytes(self) -> float:
        """In the optimizer step."""
        return self.states_bytes + self.step_transient + self.fixed

    @property
    def peak_bytes(self) -> float:
        return max(self.backward_bytes, self.step_bytes)

    @property
    def large_bytes(self) -> float:
        """At the peak, what an allocator has to find in a few large pieces."""
        return self.large_in_step if self.step_bytes > self.backward_bytes else self.large_in_backward


def predict_memory(
    config: TrialConfig,
    architecture: Architecture,
    *,
    ranks: int,
    seq_len: int,
    dtype: str,
    device: str = "cuda",
    attention: str = "sdpa",
    bucket_elements: int = DEFAULT_BUCKET_ELEMENTS,
    constants: MemoryConstants | None = None,
) -> MemoryEstimate:
    """Predicted peak bytes of a rank.

    What parameters and optimizer states need in the host's memory is not counted.

    Args:
        ranks: data-parallel ranks, which ZeRO's partitions are spread over.
        dtype: `fp16`, `bf16` or `fp32`.
        attention: `sdpa` for a fused kernel, `eager` where the scores of all pairs of positions are kept.
        bucket_elements: DeepSpeed's `reduce_bucket_size`.
    """
    constants = constants or MemoryConstants()
    if config.vocabulary:
        architecture = architecture.enlarged(config.vocabulary)
    stage, count = config.zero_stage, architecture.parameters
    width = 4 if dtype == "fp32" else 2
    shard = count / ranks
    if config.dropout == "none":
        architecture = dataclasses.replace(architecture, dropout=False)
    if config.attention != "default":
        attention = "eager" if config.attention == "eager" else "sdpa"
    # fp32 master weights and Adam's two moments; in fp32 the weights are their own master.
    state_width = 8 if dtype == "fp32" else 12
    offloaded = {"cpu": 1.0, "cpu_half": 0.5}.get(config.offload_optimizer, 0.0)
    transient: float
    if stage == 0 and dtype == "fp32":
        # Plain torch Adam steps in place, tensor by tensor.
        transient = width * count
    elif stage == 0:
        transient = width * count + 8 * count  # the gradients, their fp32 copies, and these flattened
    elif stage in (1, 2):
        transient = 2 * width * shard + 4 * shard  # averaged gradients, flattened, in fp32
    else:
        # The gradients; those of one group flattened, and in fp32.
        copies = 4 if dtype == "fp32" else width + 4
        transient = width * shard + copies * min(shard, SUB_GROUP_ELEMENTS) + width * min(bucket_elements, count)
    if offloaded:
        # The gradients, and the bucket through which they go to the host.
        on_their_way = width * shard + width * min(bucket_elements, count)
        transient = offloaded * on_their_way + (1 - offloaded) * transient
    # Plain torch Adam flattens nothing.
    flattened = 4.0 * min(shard, SUB_GROUP_ELEMENTS) if stage else 0.0 if dtype == "fp32" else 4.0 * count
    largest = max(architecture.vocabulary * architecture.hidden, architecture.block_parameters)
    accumulates = config.gradient_accumulation_steps > 1
    buckets = 0.0
    if stage == 3:
        buckets = width * min(bucket_elements, count)
    elif offloaded:
        # GPT2-xl on one H100: 19.54 and 19.33 GiB measured, 19.42 predicted; without these 18.34.
        buckets = width * (min(bucket_elements, count) + largest)
    elif stage == 1 and accumulates:
        # Made in the first micro-step's backward pass, and not let go before the gradients are reduced in the last.
        buckets = width * min(bucket_elements, count)
    gathered = 0.0
    kept_elsewhere = stage == 3 and config.offload_parameters == "cpu"
    if stage == 3 and (ranks > 1 or kept_elsewhere):
        # What comes next, and what the forward pass had last, which is kept: it and its reuse are as far from the turn.
        elements = largest + architecture.block_parameters + PREFETCH_ELEMENTS + REUSE_ELEMENTS // 2
        gathered = width * min(LIVE_PARAMETER_ELEMENTS, elements, count)
    # ZeRO-3's gradient buffer is there from the start.
    waits = stage == 3 or accumulates
    waiting = (shard if stage >= 2 else count) if waits else 0.0
    if offloaded and stage >= 2:
        waiting = 0.0  # on the host, too
    batch_tokens = config.micro_batch_size * seq_len
    hidden_tensor = width * batch_tokens * architecture.hidden
    tensors = tensors_of_a_block(
        architecture, seq_len=seq_len, width=width, attention=attention, compiled=config.compile != "off"
    )
    block = constants.activation_factor * hidden_tensor * tensors
    every = config.activation_checkpointing
    checkpointed = -(-architecture.layers // every) if every else 0
    # Of a checkpointed block only its input is kept.
    activations = (architecture.layers - checkpointed) * block + checkpointed * hidden_tensor
    # The log-softmax, its gradient and that of the logits; transformers takes causal models' loss in fp32.
    loss_width = width if architecture.is_masked else 4
    logits = batch_tokens * architecture.vocabulary * (constants.logit_bytes or 3 * loss_width)
    large: float = batch_tokens * architecture.vocabulary * loss_width
    if config.loss_computation != "default":
        large /= LOSS_CHUNKS
        # Those of a piece, and the sum of the pieces' gradients of the projection.
        logits = logits / LOSS_CHUNKS + width * architecture.vocabulary * architecture.hidden
    if stage >= 1:
        large += width * min(bucket_elements, count)
    partition = 0.0 if kept_elsewhere else shard
    if config.parameter_group:
        partition += count / config.parameter_group  # the group's copy for the backward pass
    return MemoryEstimate(
        parameters=width * (partition if stage == 3 else count),
        gradients=width * waiting,
        optimizer_states=(1 - offloaded) * state_width * (count if stage == 0 else shard),
        gathered=gathered,
        buckets=buckets,
        activations=activations,
        logits=logits,
        recomputed_block=block if every else 0.0,
        step_transient=transient,
        large_in_backward=large,
        large_in_step=width * largest + (1 - offloaded) * flattened,
        fixed=constants.fixed_bytes if device == "cuda" else constants.process_bytes,
    )


def tensors_of_a_block(
    architecture: Architecture, *, seq_len: int, width: int, attention: str, compiled: bool
) -> float:
    """Tensors that one block keeps, in units of one of shape (mbs, seq_len, hidden) in the training precision.

    A compiled block computes cheap things again in the backward pass: activations, and dropout from its seed.
    """
    query = architecture.heads * architecture.head_dim / architecture.hidden
    key_value = 2 * architecture.key_value_heads * architecture.head_dim / architecture.hidden
    feed_forward = architecture.intermediate / architecture.hidden
    mask = 1 / width if architecture.dropout and not compiled else 0.0  # a byte an element
    norms = 5.0 if compiled else 4.0  # two norms' inputs and outputs; compiled, a residual more
    if architecture.rms_norm:
        norms += 2 * 4 / width  # transformers computes RMSNorm in fp32
    mixing = query + key_value + query + mask
    # One tensor of a score for each head and pair of positions.
    scores = architecture.heads * seq_len / architecture.hidden
    if attention == "eager" or architecture.relative_columns:
        mixing += scores * (2 + mask if architecture.dropout else 1)  # the softmax and what dropout left of it
    if architecture.relative_columns:
        # The scores that are looked up by position, the positions' embeddings, repeated for each sample, and keys that
        # are scaled beside those that are not.
        mixing += architecture.relative_columns * (architecture.heads / architecture.hidden + query / seq_len)
        mixing += key_value / 2
    activations = feed_forward * (4 if architecture.gated_mlp else 2) + mask
    if architecture.unfused_activation and not compiled:
        activations += 3 * feed_forward  # tanh, half of x, one plus tanh
    return norms + mixing + activations
