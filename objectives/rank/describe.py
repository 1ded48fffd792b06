"""A process that builds a model without memory for its weights and prints its `ModelFacts` (`workload.model_facts`).

Standard input is a configuration in transformers' JSON form. The last line of standard output is a JSON object:
`facts`, or `refused` with a sentence that goes on after the model's name.
"""

import contextlib
import copy
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from ds_tune.objectives.cost_model.architecture import relative_columns
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.rank.experts import routed_shares
from ds_tune.objectives.rank.model_config import (
    Head,
    Refusal,
    attention_sizes,
    head_of,
    read_config,
    stated_number,
    usable_length,
)
from ds_tune.objectives.workload.model_facts import ModelFacts
from ds_tune.objectives.workload.model_sizes import check_sizes

GATES = (
    "gate_proj",
    "gate_up_proj",
    "w3",
    "wi_1",
    "up_gate_proj",
    "gate_and_up_proj",
    "fc1_gate",
    "dense_h_to_4h_gate",
)
"""Names of the third matrix of an MLP with a gate, in transformers' models."""


def describe(config: transformers.PretrainedConfig) -> ModelFacts:
    """The facts of a configuration's model.

    Raises:
        Refusal: it is of no kind that is trained here, or transformers cannot build it.
    """
    head = head_of(config)
    model = build_empty(config, head)
    text = config.get_text_config()
    layers, heads, head_dim = attention_sizes(config)
    hidden = stated_number(text, "hidden_size") or model.get_input_embeddings().weight.shape[-1]
    vocabulary = stated_number(text, "vocab_size") or model.get_input_embeddings().weight.shape[0]
    key_value_heads = stated_number(text, "num_key_value_heads") or heads
    blocks = repeated_blocks(model)
    per_token = multiplied(model, config)
    shares = routed_shares(model, config)
    last = blocks[-1]
    inner = [name for name, _ in last.named_modules()] + [name for name, _ in last.named_parameters()]
    is_gated = any(part in GATES for name in inner for part in name.split("."))
    classes = {type(module).__name__ for module in model.modules()}
    intermediate = stated_number(text, "intermediate_size")
    if shares or not intermediate:
        in_blocks = {id(each): each for block in blocks for each in block.parameters()}
        mean = sum(per_token[each] for each in in_blocks) / max(layers, 1)
        attention = (2 * heads + 2 * key_value_heads) * head_dim * hidden
        intermediate = max(round((mean - attention) / ((3 if is_gated else 2) * hidden)), 1)
    return ModelFacts(
        model_type=text.model_type,
        trained_class=head.trained_class,
        named_class=head.named_class,
        is_masked=head.is_masked,
        positions=usable_length(config),
        parameters=sum(each.numel() for each in model.parameters()),
        parameters_per_token=round(sum(per_token.values())),
        block_parameters=max(sum(each.numel() for each in block.parameters()) for block in blocks),
        block_matrices=max(sum(each.dim() > 1 for each in last.parameters()), 1),
        layers=max(layers, 1),
        hidden=hidden,
        heads=heads,
        key_value_heads=key_value_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        vocabulary=vocabulary,
        gated_mlp=is_gated,
        unfused_activation="NewGELUActivation" in classes,
        rms_norm=any("RMSNorm" in name for name in classes),
        dropout=any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules()),
        relative_columns=relative_columns(text.to_dict(), stated_number(text, "max_position_embeddings") or 1)
        if text.model_type.startswith("deberta")
        else 0,
    )


def build_empty(config: transformers.PretrainedConfig, head: Head) -> Any:
    """The model without memory for its weights.

    Raises:
        Refusal: transformers cannot build it.
    """
    try:
        with torch.device("meta"):
            # Decoders that are built alone write into their configuration that they are.
            return head.auto_class.from_config(copy.deepcopy(config), trust_remote_code=False)
    except Exception as error:  # whatever a model's constructor says of its sizes
        said = " ".join(str(error).split()) or type(error).__name__
        raise Refusal(f" cannot be built by transformers: {said.split('. ')[0]}") from error


def repeated_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that repeat, as transformers marks them; where it does not, the list with the most parameters."""
    marked = [module for module in model.modules() if isinstance(module, transformers.GradientCheckpointingLayer)]
    if marked:
        return marked
    lists = [list(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
    count = [sum(each.numel() for block in blocks for each in block.parameters()) for blocks in lists]
    return lists[count.index(max(count))] if lists else [model]


def multiplied(model: Any, config: transformers.PretrainedConfig) -> dict[int, float]:
    """Elements of each parameter, by its `id`, that one token is multiplied with."""
    times, shares = _calls(model), routed_shares(model, config)
    return {id(each): each.numel() * shares.get(id(each), 1.0) * times.get(id(each), 1) for each in model.parameters()}


def _calls(model: Any) -> dict[int, int]:
    """How often each parameter, by its `id`, takes part in a forward pass: a layer that is shared, several times."""
    calls: dict[torch.nn.Module, int] = {}

    def count(module: torch.nn.Module, *_: Any) -> None:
        calls[module] = calls.get(module, 0) + 1

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    # Some models look at values, which there are none of; none of these has a layer that is shared.
    with contextlib.suppress(Exception), torch.no_grad():
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64, device="meta"))
    for hook in hooks:
        hook.remove()
    times: dict[int, int] = {}
    for module, called in calls.items():
        for each in module.parameters(recurse=False):
            times[id(each)] = max(times.get(id(each), 1), called)
    return times


def main() -> None:
    document = sys.stdin.read()
    answer: dict[str, Any]
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "config.json")
            path.write_text(document)
            config = read_config(str(path))
        check_sizes(config.to_dict(), "")
        answer = {"facts": dataclasses.asdict(describe(config))}
    except Refusal as error:
        answer = {"refused": str(error)}
    except UsageError as error:
        answer = {"refused": str(error).removeprefix("`model=`")}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
