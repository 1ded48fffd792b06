"""Builds the model of a workload on this rank's device."""

import contextlib
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
import transformers

from ds_tune.objectives.ds_config import dtype_of
from ds_tune.objectives.rank.describe import build_empty, multiplied
from ds_tune.objectives.rank.experts import leaf_classes
from ds_tune.objectives.rank.model_config import attention_sizes, head_of, model_class
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.objectives.workload.model_sizes import FAMILIES

TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def build_model(
    workload: HuggingFaceWorkload,
    config: transformers.PretrainedConfig,
    ds_config: Mapping[str, Any],
    device: torch.device,
) -> torch.nn.Module:
    """The model in the precision that DeepSpeed is told, on the device from its first byte.

    Under ZeRO-3 each layer is partitioned as soon as it is made, so that no rank ever holds the whole model; but
    pretrained weights are loaded whole, and `deepspeed.initialize` partitions them.
    """
    torch.manual_seed(0)
    dtype = TORCH_DTYPES[dtype_of(ds_config)]
    auto_class = model_class(config)
    with contextlib.ExitStack() as contexts:
        if ds_config["zero_optimization"]["stage"] == 3 and not workload.pretrained:
            auto_class._model_mapping[type(config)]  # imported now: DeBERTa's TorchScript does not compile in there
            # BERT's own initialization fails on parameters that are partitioned.
            contexts.enter_context(transformers.initialization.no_init_weights())
            # The precision is the configuration's: an argument `dtype` is not heeded on CPUs, where it makes fp32 bf16.
            contexts.enter_context(deepspeed.zero.Init(config_dict_or_path=dict(ds_config)))
        contexts.enter_context(device)
        model: Any
        if workload.pretrained:
            model = auto_class.from_pretrained(workload.model, config=config, dtype=dtype)
        else:
            model = auto_class.from_config(config, dtype=dtype)
    if not workload.pretrained:
        initialize_weights(model)
        model.tie_weights()
    if ds_config["zero_optimization"]["stage"] == 3 and (leaves := leaf_classes(model)):
        deepspeed.utils.set_z3_leaf_modules(model, leaves)
    trained: torch.nn.Module = model.train()
    return trained


def initialize_weights(model: torch.nn.Module) -> None:
    """Gives a new model its initial weights, the same in every ZeRO stage and on every rank.

    transformers has done so already, but not under `deepspeed.zero.Init`, where parameters are partitioned, and empty,
    as soon as they are made. Its `initialize_weights_zero3` gathers the parameters of one module at a time, and so
    misses those that a module sets in its children, as GPT-2's attention does. Here a whole transformer block is
    gathered.
    """
    owners = {
        module: owner
        for owner in model.modules()
        if isinstance(owner, transformers.PreTrainedModel)
        for module in owner.modules()
    }
    blocks = [module for module in model.modules() if isinstance(module, transformers.GradientCheckpointingLayer)]
    in_blocks = {module for block in blocks for module in block.modules()}
    units = [list(block.modules()) for block in blocks]
    units.append([module for module in model.modules() if module not in in_blocks])
    partitioned = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    torch.manual_seed(0)
    for modules in units:
        # A tied parameter belongs to several modules, and DeepSpeed gathers it once.
        parameters = {id(each): each for module in modules for each in module.parameters(recurse=False)}
        gathered = deepspeed.zero.GatheredParameters(parameters.values(), modifier_rank=0, enabled=partitioned)
        with torch.no_grad(), gathered:
            if not partitioned or torch.distributed.get_rank() == 0:
                for module in reversed(modules):  # children before their parents
                    owners[module]._init_weights(module)


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters of the whole model, also where ZeRO-3 has partitioned them."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


def flops_per_sample(config: transformers.PretrainedConfig, parameters: int, seq_len: int) -> float:
    """Model FLOPs of one sample's forward and backward pass, as `Architecture.flops_per_sample` has them.

    The attention term is left out where the configuration does not say its layers and width.

    Args:
        parameters: all that the model has, also those that a token is not multiplied with.
    """
    layers, heads, head_dim = attention_sizes(config)
    per_token = parameters + _more_per_token(config)
    return float(seq_len * (6 * per_token + 12 * layers * heads * head_dim * seq_len))


_MORE: dict[str, int] = {}


def _more_per_token(config: transformers.PretrainedConfig) -> int:
    """Parameters that a token is multiplied with more than the model has; fewer, thus below 0, among experts."""
    if config.model_type in FAMILIES:
        return 0
    key = config.to_json_string(use_diff=False)
    if key not in _MORE:
        model = build_empty(config, head_of(config))
        _MORE[key] = round(sum(multiplied(model, config).values())) - count_parameters(model)
    return _MORE[key]
