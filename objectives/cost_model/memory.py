"""Bytes that a rank needs at its peak: a sum of named terms, each a function with its constants beside it.

Two moments can be the peak: the start of the backward pass, when every activation is alive; and the optimizer step,
when activations are gone and DeepSpeed holds its gradients in fp32. The states follow ZeRO (Rajbhandari et al. 2020)
and DeepSpeed 0.19's optimizers; `block_tensors` counts what is kept of a block. docs/cost-model.md has the table.
"""

import dataclasses

from ds_tune.objectives.cost_model.architecture import Architecture
from ds_tune.objectives.cost_model.block_tensors import tensors_of_a_block
from ds_tune.objectives.knobs import LOSS_CHUNKS
from ds_tune.objectives.trial import TrialConfig

DEFAULT_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's `reduce_bucket_size`."""

OFFLOADED_SHARE = {"cpu": 1.0, "cpu_half": 0.5}
"""Fraction of the optimizer in the host's memory, by the values of `offload_optimizer`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConstants:
    """Constants that other versions of transformers and torch need differently (benchmarks/published.py)."""

    activation_factor: float = 1.0
    """Measured bytes of a sample over the tensors that were counted."""
    logit_bytes: float | None = None
    """Bytes of each logit; None for what today's transformers keep."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Predicted bytes of one rank."""

    parameters: float
    gradients: float
    """Gradients that wait while another micro-step runs: none where there is only one."""
    optimizer_states: float
    gathered: float
    """Whole parameters that ZeRO-3 has from the other ranks, or from the host, where the backward pass begins."""
    buckets: float
    """Buckets that are there when the backward pass begins; other stages make and free theirs within it."""
    activations: float
    """Activations of one micro-batch, logits and loss not counted."""
    logits: float
    """Logits kept for the loss, and their gradients."""
    recomputed_block: float
    """Tensors of a checkpointed block while it is computed again, when the logits are gone."""
    step_transient: float
    """Tensors of the optimizer step besides parameters and states."""
    large_in_backward: float
    """The few largest tensors when the backward pass begins or soon after: the logits in the loss's precision, and the
    bucket in which gradients are reduced."""
    large_in_step: float
    """The few largest tensors of the optimizer step: the gradients in fp32, flattened."""
    fixed: float

    @property
    def states_bytes(self) -> float:
        return self.parameters + self.optimizer_states

    @property
    def backward_bytes(self) -> float:
        """Bytes at the start of the backward pass."""
        return self.states_bytes + self.gradients + self.gathered + self.buckets + self.fixed + self.batch_bytes

    @property
    def batch_bytes(self) -> float:
        """Bytes that grow with the micro-batch."""
        return self.activations + max(self.logits, self.recomputed_block)

    @property
    def step_bytes(self) -> float:
        """Bytes in the optimizer step."""
        return self.states_bytes + self.step_transient + self.fixed

    @property
    def peak_bytes(self) -> float:
        return max(self.backward_bytes, self.step_bytes)

    @property
    def large_bytes(self) -> float:
        """Bytes at the peak that an allocator has to find in a few large pieces."""
        return self.large_in_step if self.step_bytes > self.backward_bytes else self.large_in_backward


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Rank:
    """A rank whose peak is to be predicted, as every term takes it."""

    config: TrialConfig
    architecture: Architecture
    ranks: int
    seq_len: int
    dtype: str
    attention: str
    bucket_elements: int
    """Elements of a bucket of gradients, which is no larger than the model."""
    constants: MemoryConstants

    @property
    def stage(self) -> int:
        return self.config.zero_stage

    @property
    def count(self) -> int:
        """Parameters of the model."""
        return self.architecture.parameters

    @property
    def trained(self) -> int:
        """Parameters that have gradients and optimizer states."""
        return self.architecture.trained_parameters

    @property
    def shard(self) -> float:
        """Trained parameters of a partition."""
        return self.trained / self.ranks

    @property
    def width(self) -> int:
        """Bytes of an element in the training precision."""
        return bytes_per_element(self.dtype)

    @property
    def offloaded_share(self) -> float:
        return OFFLOADED_SHARE.get(self.config.offload_optimizer, 0.0)

    @property
    def accumulates(self) -> bool:
        return self.config.gradient_accumulation_steps > 1

    @property
    def offloads_parameters(self) -> bool:
        return self.stage == 3 and self.config.offload_parameters == "cpu"

    @property
    def largest_module(self) -> int:
        """Parameters of the largest module that is gathered, or reduced, as a whole."""
        return max(self.architecture.vocabulary * self.architecture.hidden, self.architecture.block_parameters)

    @property
    def batch_tokens(self) -> int:
        return self.config.micro_batch_size * self.seq_len

    @property
    def hidden_bytes(self) -> int:
        """Bytes of a tensor of shape (mbs, seq_len, hidden)."""
        return self.width * self.batch_tokens * self.architecture.hidden


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
    if config.vocabulary:
        architecture = architecture.enlarged(config.vocabulary)
    if config.dropout == "none":
        architecture = dataclasses.replace(architecture, dropout=False)
    if config.attention != "default":
        attention = "eager" if config.attention == "eager" else "sdpa"
    rank = _Rank(
        config=config,
        architecture=architecture,
        ranks=ranks,
        seq_len=seq_len,
        dtype=dtype,
        attention=attention,
        bucket_elements=min(bucket_elements, architecture.trained_parameters),
        constants=constants or MemoryConstants(),
    )
    return MemoryEstimate(
        parameters=_parameter_bytes(rank),
        gradients=_waiting_gradient_bytes(rank),
        optimizer_states=_optimizer_state_bytes(rank),
        gathered=_gathered_bytes(rank),
        buckets=_bucket_bytes(rank),
        activations=_activation_bytes(rank),
        logits=_logit_bytes(rank),
        recomputed_block=_block_bytes(rank) if config.activation_checkpointing else 0.0,
        step_transient=_step_transient_bytes(rank),
        large_in_backward=_large_bytes_in_backward(rank),
        large_in_step=_large_bytes_in_step(rank),
        fixed=FIXED_BYTES if device == "cuda" else PROCESS_BYTES,
    )


def bytes_per_element(dtype: str) -> int:
    """Bytes of an element of the training precision."""
    return 4 if dtype == "fp32" else 2


FIXED_BYTES = 0.3e9
"""Workspaces and buffers that every configuration has: the one fitted figure, on the first surface of an H200."""
PROCESS_BYTES = 0.5e9
"""Fixed bytes on a CPU, where the interpreter and its libraries count as well."""


# States: parameters, gradients, optimizer.


def _parameter_bytes(rank: _Rank) -> float:
    """Bytes of parameters in the training precision, partitioned by ZeRO-3."""
    if rank.stage < 3:
        return rank.width * rank.count
    partition = 0.0 if rank.offloads_parameters else rank.count / rank.ranks
    if rank.config.parameter_group:
        partition += rank.count / rank.config.parameter_group  # the group's copy for the backward pass
    return rank.width * partition


def _waiting_gradient_bytes(rank: _Rank) -> float:
    """Bytes of gradients that wait for another micro-step. ZeRO-3's buffer is there from the start."""
    if rank.stage < 3 and not rank.accumulates:
        return 0.0
    if rank.stage < 2:
        return rank.width * rank.trained
    return 0.0 if rank.offloaded_share else rank.width * rank.shard  # they follow the optimizer to the host


MIXED_STATE_BYTES = 12
"""Bytes for each parameter: fp32 master weights and Adam's two moments."""
SINGLE_STATE_BYTES = 8
"""Bytes for each parameter in fp32, where the weights are their own master."""


def _optimizer_state_bytes(rank: _Rank) -> float:
    """Bytes of Adam's states on the device, partitioned from ZeRO-1 on."""
    state_bytes = SINGLE_STATE_BYTES if rank.dtype == "fp32" else MIXED_STATE_BYTES
    return (1 - rank.offloaded_share) * state_bytes * (rank.trained if rank.stage == 0 else rank.shard)


LIVE_PARAMETER_ELEMENTS = 1_000_000_000
"""ZeRO-3 keeps at most so many gathered parameters (`stage3_max_live_parameters`)."""
REUSE_ELEMENTS = 1_000_000_000
"""ZeRO-3 keeps what it needs again before it has used so many others (`stage3_max_reuse_distance`)."""
PREFETCH_ELEMENTS = 50_000_000
"""ZeRO-3 gathers so many ahead (`stage3_prefetch_bucket_size`)."""


def _gathered_bytes(rank: _Rank) -> float:
    """Bytes of whole parameters that ZeRO-3 holds where the backward pass begins."""
    if rank.stage < 3 or (rank.ranks == 1 and not rank.offloads_parameters):
        return 0.0
    # What comes next, and what the forward pass had last, which is kept: it and its reuse are as far from the turn.
    elements = rank.largest_module + rank.architecture.block_parameters + PREFETCH_ELEMENTS + REUSE_ELEMENTS // 2
    return rank.width * min(LIVE_PARAMETER_ELEMENTS, elements, rank.count)


def _bucket_bytes(rank: _Rank) -> float:
    """Bytes of buckets that are there when the backward pass begins."""
    if rank.stage == 3:
        return rank.width * rank.bucket_elements
    if rank.offloaded_share:
        # GPT2-xl on one H100: 19.54 and 19.33 GiB measured, 19.42 predicted; without these 18.34.
        return rank.width * (rank.bucket_elements + rank.largest_module)
    # ZeRO-1 makes its bucket in the first micro-step, and frees it when gradients are reduced in the last.
    return rank.width * rank.bucket_elements if rank.stage == 1 and rank.accumulates else 0.0


# The micro-batch: activations, logits.


def _block_bytes(rank: _Rank) -> float:
    """Bytes that one block keeps for its backward pass."""
    is_compiled = rank.config.compile != "off"
    tensors = tensors_of_a_block(
        rank.architecture, seq_len=rank.seq_len, width=rank.width, attention=rank.attention, compiled=is_compiled
    )
    return rank.constants.activation_factor * rank.hidden_bytes * tensors


def _activation_bytes(rank: _Rank) -> float:
    """Bytes of all blocks' activations; of a checkpointed block only its input is kept."""
    every, layers = rank.config.activation_checkpointing, rank.architecture.layers
    checkpointed = -(-layers // every) if every else 0
    return (layers - checkpointed) * _block_bytes(rank) + checkpointed * rank.hidden_bytes


LOSS_COPIES = 3
"""Tensors of the logits' size: the log-softmax, its gradient and that of the logits."""


def _loss_width(rank: _Rank) -> int:
    """Bytes of an element in the loss: transformers takes causal models' loss in fp32."""
    return rank.width if rank.architecture.is_masked else 4


def _logit_bytes(rank: _Rank) -> float:
    """Bytes of logits and their gradients."""
    each = rank.constants.logit_bytes or LOSS_COPIES * _loss_width(rank)
    logits = rank.batch_tokens * rank.architecture.vocabulary * each
    if rank.config.loss_computation == "default":
        return logits
    # Those of a piece, and the sum of the pieces' gradients of the projection.
    return logits / LOSS_CHUNKS + rank.width * rank.architecture.vocabulary * rank.architecture.hidden


# The optimizer step.

SUB_GROUP_ELEMENTS = 1_000_000_000
"""ZeRO-3's optimizer takes so many at once (`sub_group_size`)."""


def _step_transient_bytes(rank: _Rank) -> float:
    """Bytes of gradients and their copies in the optimizer step."""
    share = rank.offloaded_share
    # On the way to the host: the gradients, and the bucket through which they go.
    on_their_way = rank.width * (rank.shard + rank.bucket_elements) if share else 0.0
    return share * on_their_way + (1 - share) * _device_transient_bytes(rank)


def _device_transient_bytes(rank: _Rank) -> float:
    """Bytes of gradients and their copies where the optimizer is on the device."""
    width = rank.width
    if rank.stage == 0:
        # In fp32 plain torch Adam steps in place. Else the gradients, their fp32 copies, and these flattened.
        return width * rank.trained + (0 if rank.dtype == "fp32" else 4 + 4) * rank.trained
    if rank.stage < 3:
        return (2 * width + 4) * rank.shard  # averaged gradients, flattened, in fp32
    # The gradients; those of one group flattened, and in fp32.
    copies = 4 if rank.dtype == "fp32" else width + 4
    return width * rank.shard + copies * min(rank.shard, SUB_GROUP_ELEMENTS) + width * rank.bucket_elements


# Large tensors, for which an allocator needs large free pieces.


def _large_bytes_in_backward(rank: _Rank) -> float:
    """Bytes of the logits in the loss's precision, and of the bucket in which gradients are reduced."""
    logits: float = rank.batch_tokens * rank.architecture.vocabulary * _loss_width(rank)
    if rank.config.loss_computation != "default":
        logits /= LOSS_CHUNKS
    return logits + (rank.width * rank.bucket_elements if rank.stage >= 1 else 0.0)


def _large_bytes_in_step(rank: _Rank) -> float:
    """Bytes of the largest module's gradient, and of the fp32 gradients that an optimizer flattens."""
    flattened = 4.0 * min(rank.shard, SUB_GROUP_ELEMENTS)
    if rank.stage == 0:
        flattened = 0.0 if rank.dtype == "fp32" else 4.0 * rank.trained  # plain torch Adam flattens nothing
    return rank.width * min(rank.largest_module, rank.trained) + (1 - rank.offloaded_share) * flattened
