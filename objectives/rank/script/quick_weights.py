"""Random weights that are made quickly, for runs in which only their size matters.

Torch draws random numbers on a CPU one after the other: many seconds for a large model, in every trial. Where a run is
timed, a large tensor is filled with a block of them over and over. What is learned of a script, and its losses, are of
its own weights.
"""

from collections.abc import Callable
from typing import Any

import deepspeed
import torch

from ds_tune.objectives.rank.script.replaced import around

BLOCK_ELEMENTS = 1_000_003
"""A prime, so that rows of a matrix don't repeat each other."""


def make_weights_quickly() -> None:
    """Has weights made so until DeepSpeed gets the model: what a script draws in training takes the time it takes.

    Called before the script begins.
    """
    drawing = {name: getattr(torch.Tensor, name) for name in ("normal_", "uniform_")}
    for name in drawing:
        around(torch.Tensor, name, _repeated)

    def initialize(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for name, drawn in drawing.items():
            setattr(torch.Tensor, name, drawn)
        return original(*args, **kwargs)

    around(deepspeed, "initialize", initialize)


def _repeated(original: Callable[..., Any], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if tensor.device.type != "cpu" or tensor.numel() <= BLOCK_ELEMENTS or not tensor.is_contiguous():
        drawn: torch.Tensor = original(tensor, *args, **kwargs)
        return drawn
    with torch.no_grad():
        block = original(torch.empty(BLOCK_ELEMENTS, dtype=tensor.dtype), *args, **kwargs)
        flat = tensor.detach().view(-1)
        whole = flat.numel() // BLOCK_ELEMENTS * BLOCK_ELEMENTS
        flat[:whole].view(-1, BLOCK_ELEMENTS).copy_(block)
        flat[whole:].copy_(block[: flat.numel() - whole])
    return tensor
