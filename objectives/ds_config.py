"""TrialConfig -> DeepSpeed JSON: the only place that writes a DeepSpeed configuration."""

import copy
from collections.abc import Mapping
from typing import Any

from ds_tune.objectives.trial import KNOBS, TrialConfig
from ds_tune.objectives.workload.kinds import Workload

# DeepSpeed's default bucket of 5e8 elements is 2 GB of fp32 per rank: on CPU that is slower and crowds out the model.
CPU_BUCKET_ELEMENTS = 5_000_000

# Stated rather than left to DeepSpeed, whose default for clipping changed in 2026.
GRADIENT_CLIPPING = 1.0
LEARNING_RATE = 1e-5
NEVER_PRINT = 1_000_000_000


def deepspeed_config(config: TrialConfig, workload: Workload, *, ranks: int, device: str) -> dict[str, Any]:
    """The complete DeepSpeed configuration of one trial, ready for `deepspeed.initialize`.

    The user's settings come first; batch sizes and the ZeRO stage are the trial's; what neither names has
    ds-tune's defaults: AdamW, gradient clipping 1.0, and on CPU torch's own Adam and small buckets. A person's own
    script gets no defaults: see `overlaid`.

    Args:
        device: `cuda` or `cpu`.
    """
    if workload.ds_config_is_whole:
        return overlaid(workload.base_ds_config, config, ranks=ranks, keeps_auto=workload.fills_in_batch_sizes)
    document = _without_auto(workload.base_ds_config)
    for key in (
        "autotuning",
        "managed_gradient_accumulation",
    ):  # who calls the optimizer's step is not the file's to say
        document.pop(key, None)
    document["train_micro_batch_size_per_gpu"] = config.micro_batch_size
    document["gradient_accumulation_steps"] = config.gradient_accumulation_steps
    document["train_batch_size"] = config.global_batch_size(ranks)
    zero = document.setdefault("zero_optimization", {})
    zero["stage"] = config.zero_stage
    _set_precision(document, workload.dtype)
    optimizer = document.setdefault("optimizer", {"type": "AdamW", "params": {"lr": LEARNING_RATE}})
    document.setdefault("gradient_clipping", GRADIENT_CLIPPING)
    document.setdefault("steps_per_print", NEVER_PRINT)
    for field, value in config.knobs_on.items():
        if (writes := KNOBS[field].writes) is not None:
            _merge(document, writes(value))
    if device == "cpu":
        zero.setdefault("reduce_bucket_size", CPU_BUCKET_ELEMENTS)
        zero.setdefault("allgather_bucket_size", CPU_BUCKET_ELEMENTS)
        if optimizer.get("type", "").lower() in ("adam", "adamw"):
            # DeepSpeed's CPUAdam is compiled at first use, for a minute or two; torch's is at hand.
            optimizer.setdefault("params", {}).setdefault("torch_adam", True)
    return document


def overlaid(
    document: Mapping[str, Any], config: TrialConfig, *, ranks: int, keeps_auto: bool = False
) -> dict[str, Any]:
    """A person's own configuration with nothing changed but what a trial decides.

    Args:
        keeps_auto: leave batch sizes that are `"auto"`, or not there, to whoever fills them in: transformers' Trainer.
    """
    laid: dict[str, Any] = copy.deepcopy(dict(document))
    laid.pop("autotuning", None)
    batch = {
        "train_batch_size": config.global_batch_size(ranks),
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
    }
    for key, value in batch.items():
        if not keeps_auto or laid.get(key, "auto") != "auto":
            laid[key] = value
    _merge(laid, {"zero_optimization": {"stage": config.zero_stage}})
    for field, value in config.knobs_on.items():
        if (writes := KNOBS[field].writes) is not None:
            _merge(laid, writes(value))
    return laid


def dtype_of(document: Mapping[str, Any]) -> str:
    """The precision that a DeepSpeed configuration trains in: `fp16`, `bf16` or `fp32`."""
    return next((name for name in ("fp16", "bf16") if document.get(name, {}).get("enabled")), "fp32")


def _merge(document: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Lays settings over a document, block by block."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and isinstance(document.get(key), dict):
            _merge(document[key], value)
        else:
            document[key] = copy.deepcopy(value)


def _set_precision(document: dict[str, Any], dtype: str) -> None:
    """Turns on the workload's precision and keeps the user's loss-scaling settings for it."""
    for name in ("fp16", "bf16"):
        block = document.pop(name, {})
        if name == dtype:
            document[name] = {**(block if isinstance(block, dict) else {}), "enabled": True}


def _without_auto(document: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without the values `"auto"`, which transformers' Trainer fills in and DeepSpeed refuses."""
    kept: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            kept[key] = _without_auto(value)
        elif value != "auto":
            kept[key] = copy.deepcopy(value)
    return kept
