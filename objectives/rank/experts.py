"""Mixtures of experts in a model: which modules hold experts, how many of them a token goes to, and ZeRO-3's leaves."""

from collections.abc import Iterator

import torch
import transformers

CHOSEN_NAMES = ("top_k", "num_experts_per_tok", "topk", "moe_top_k")
"""Attributes of a router or its block: experts that a token goes to."""
CHOSEN_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "top_k",
    "top_k_experts",
    "moe_k",
)
"""Keys of configurations that say the same."""


def routed_experts(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, torch.nn.Module]]:
    """Yields each module that holds the weights of several experts, stacked, of which a token goes to some; and the
    module that it is part of."""
    for parent in model.modules():
        for module in parent.children():
            name = type(module).__name__
            # Experts that are shared see every token.
            if "Expert" in name and "Shared" not in name and _stacked(module):
                yield module, parent


def _stacked(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Parameters of a module itself that have an expert for each row."""
    own = list(module.parameters(recurse=False))
    count = next((_shape(each)[0] for each in own if len(_shape(each)) == 3), None)
    return [each for each in own if count is not None and len(_shape(each)) > 1 and _shape(each)[0] == count]


def _shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Shape of a parameter, also where ZeRO-3 has partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def routed_shares(model: torch.nn.Module, config: transformers.PretrainedConfig) -> dict[int, float]:
    """Fraction of each expert parameter, by its `id`, that one token is multiplied with."""
    shares: dict[int, float] = {}
    text = config.get_text_config()
    for module, parent in routed_experts(model):
        # JetMoe's attention, too, chooses among experts, each block by a router of its own.
        near = (getattr(each, name, None) for each in (parent, *parent.modules()) for name in CHOSEN_NAMES)
        said = (getattr(text, key, None) for key in CHOSEN_KEYS)
        chosen = next((each for each in (*near, *said) if isinstance(each, int) and each > 0), None)
        for parameter in _stacked(module):
            experts = _shape(parameter)[0]
            shares[id(parameter)] = 1.0 if chosen is None else min(chosen / experts, 1.0)
    return shares


def leaf_classes(model: torch.nn.Module) -> list[type[torch.nn.Module]]:
    """Classes of the modules whose parameters ZeRO-3 gathers at once: each router with its experts.

    Which experts run differs from token to token, and ranks that gather them one by one in different orders wait for
    each other for ever.
    """
    found: dict[type[torch.nn.Module], None] = {}
    for module, parent in routed_experts(model):
        is_block = isinstance(parent, transformers.GradientCheckpointingLayer)
        found[type(module if is_block else parent)] = None
    return list(found)
