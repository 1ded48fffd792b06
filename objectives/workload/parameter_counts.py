"""Parameters of a model as it was built, adapters included."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCounts:
    """What a live model says of its parameters and its configuration does not."""

    parameters: int
    trainable: int
    adapter_inputs: float
    """Elements a token that a transformer block keeps for the gradients of adapters, over its hidden size; 0 without
    adapters."""
