"""Tensors that one transformer block keeps for its backward pass.

Counted tensor by tensor, after Korthikanti et al. 2022 ("Reducing Activation Recomputation"), with what Hugging Face's
models keep besides.
"""

from ds_tune.objectives.cost_model.architecture import Architecture


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
    if architecture.is_frozen:
        # Matrices and norms without gradients keep nothing of what they take in.
        norms = 2 * 4 / width if architecture.rms_norm and not compiled else 2.0
        activations -= feed_forward * (2 if architecture.gated_mlp and compiled else 1)
    return norms + mixing + activations + architecture.adapter_inputs
