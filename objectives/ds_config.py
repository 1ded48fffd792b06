"""TrialConfig -> DeepSpeed JSON: the only place that writes a DeepSpeed configuration."""

import copy
from collections.abc import Collection, Mapping
from typing import Any

from ds_tune.objectives.ds_document import (
    NEVER_PRINT,
    WRITTEN_BY_FILE,
    has_open_schedule,
    lay_knobs,
    merge,
    quieten,
    without_open_values,
)
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.kinds import Workload

# DeepSpeed's default bucket of 5e8 elements is 2 GB of fp32 per rank: on CPU that is slower and crowds out the model.
CPU_BUCKET_ELEMENTS = 5_000_000

# Stated rather than left to DeepSpeed, whose default for clipping changed in 2026.
GRADIENT_CLIPPING = 1.0
LEARNING_RATE = 1e-5

TRAINERS_LEARNING_RATE = 5e-5
"""In the place of "auto": what transformers' `TrainingArguments` have by default."""

NOT_TORCH_S = ("bias_correction", "set_grad_none", "fp32_optimizer_states")
"""Parameters of DeepSpeed's Adam that torch's does not take; it corrects the bias always."""


def deepspeed_config(
    config: TrialConfig, workload: Workload, *, ranks: int, device: str, exported: bool = False
) -> dict[str, Any]:
    """The complete DeepSpeed configuration of one trial, ready for `deepspeed.initialize`.

    The user's settings come first; batch sizes and the ZeRO stage are the trial's; what neither names has
    ds-tune's defaults: AdamW, gradient clipping 1.0, and on CPU torch's own Adam and small buckets. A person's own
    script gets no defaults: see `overlaid`.

    Args:
        device: `cuda` or `cpu`.
        exported: it is for the person's own training, with their monitors and debugging settings; trials have none.
    """
    # On a CPU an offload is a matter of words, and what a script cannot be given it keeps as it has it.
    kept = WRITTEN_BY_FILE if device == "cpu" else workload.out_of_reach
    if workload.ds_config_is_whole:
        laid = overlaid(
            workload.base_ds_config, config, ranks=ranks, keeps_auto=workload.fills_in_batch_sizes, kept=kept
        )
        if not exported:
            quieten(laid)
        return laid
    base = dict(workload.base_ds_config)
    if has_open_schedule(base):
        del base["scheduler"]
    document = without_open_values(base)
    if not exported:
        quieten(document)
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
    if _is_open(workload.base_ds_config, "lr"):
        optimizer.setdefault("params", {}).setdefault("lr", TRAINERS_LEARNING_RATE)
    document.setdefault("gradient_clipping", GRADIENT_CLIPPING)
    document.setdefault("steps_per_print", NEVER_PRINT)
    lay_knobs(document, config, kept=kept)
    if device == "cpu":
        zero.setdefault("reduce_bucket_size", CPU_BUCKET_ELEMENTS)
        zero.setdefault("allgather_bucket_size", CPU_BUCKET_ELEMENTS)
        if optimizer.get("type", "").lower() in ("adam", "adamw"):
            _use_torch_s_adam(optimizer.setdefault("params", {}))
    return document


def _use_torch_s_adam(parameters: dict[str, Any]) -> None:
    """Has torch's Adam on a CPU, which is at hand: DeepSpeed's is compiled at first use, for a minute or two.

    Not where something is said that only DeepSpeed's can do.
    """
    if parameters.get("bias_correction", True) is not True or "torch_adam" in parameters:
        return
    for key in NOT_TORCH_S:
        parameters.pop(key, None)
    parameters["torch_adam"] = True


def _is_open(document: Mapping[str, Any], parameter: str) -> bool:
    """Whether a parameter of the optimizer, or all of them, is left to the Trainer."""
    optimizer = document.get("optimizer")
    parameters = optimizer.get("params") if isinstance(optimizer, Mapping) else optimizer
    return parameters == "auto" or (isinstance(parameters, Mapping) and parameters.get(parameter) == "auto")


def overlaid(
    document: Mapping[str, Any],
    config: TrialConfig,
    *,
    ranks: int,
    keeps_auto: bool = False,
    kept: Collection[str] = (),
) -> dict[str, Any]:
    """A person's own configuration with nothing changed but what a trial decides.

    Args:
        keeps_auto: leave batch sizes that are `"auto"`, or not there, to whoever fills them in: transformers' Trainer.
        kept: knobs that it cannot be given, see `lay_knobs`.
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
    merge(laid, {"zero_optimization": {"stage": config.zero_stage}})
    lay_knobs(laid, config, kept=kept)
    return laid


def dtype_of(document: Mapping[str, Any]) -> str:
    """The precision that a DeepSpeed configuration trains in: `fp16`, `bf16` or `fp32`."""
    return next((name for name in ("fp16", "bf16") if (document.get(name) or {}).get("enabled")), "fp32")


def _set_precision(document: dict[str, Any], dtype: str) -> None:
    """Turns on the workload's precision and keeps the user's loss-scaling settings for it."""
    for name in ("fp16", "bf16"):
        block = document.pop(name, {})
        if name == dtype:
            document[name] = {**(block if isinstance(block, dict) else {}), "enabled": True}
