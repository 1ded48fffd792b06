"""Builds the model of a workload on this rank's device."""

import contextlib
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from ds_tune.objectives.ds_config import dtype_of
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.workload.huggingface import SHIPPED_MODELS, HuggingFaceWorkload, model_config_path
from ds_tune.objectives.workload.model_sizes import check_sizes

TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def load_config(workload: HuggingFaceWorkload) -> transformers.PretrainedConfig:
    """The model's configuration: shipped, from a local file or folder, or from the hub.

    Raises:
        UsageError: it cannot be had, or the model is of no kind that is trained here.
    """
    try:
        if workload.model in SHIPPED_MODELS and not workload.pretrained:
            fields = dict(SHIPPED_MODELS[workload.model])
            config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
        else:
            path = model_config_path(workload.model)
            config = transformers.AutoConfig.from_pretrained(str(path) if path else workload.model)
    except (OSError, ValueError, StrictDataclassError) as error:
        said = " ".join(str(error).splitlines()[:2])
        raise UsageError(f"`model={workload.model}` cannot be loaded: {said}") from error
    check_sizes(config.to_dict(), workload.model)
    model_class(config)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and workload.seq_len > limit:
        raise UsageError(f"{workload.model} takes at most {limit} positions; `seq_len={workload.seq_len}` is too long")
    config.use_cache = False  # the key-value cache is for generation; in training it only costs memory
    return config


def model_class(config: transformers.PretrainedConfig) -> Any:
    """The `Auto` class that trains this kind of model: causal where it can be, masked where it says so.

    Raises:
        UsageError: the model has neither head.
    """
    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    masked = transformers.MODEL_FOR_MASKED_LM_MAPPING
    architectures = config.architectures or []
    says_masked = any(name.endswith("ForMaskedLM") for name in architectures)
    if type(config) in causal and not says_masked:
        return transformers.AutoModelForCausalLM
    if type(config) in masked:
        return transformers.AutoModelForMaskedLM
    raise UsageError(f"models of type {config.model_type} have no language-model head that transformers can train")


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
    """
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", 0) or 0
    hidden = getattr(text, "hidden_size", 0) or 0
    heads = getattr(text, "num_attention_heads", 0) or 1
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    return float(seq_len * (6 * parameters + 12 * layers * heads * head_dim * seq_len))
