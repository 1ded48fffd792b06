"""The `autotuning` block of a DeepSpeed configuration, for who comes from `deepspeed --autotuning`.

Its keys: https://www.deepspeed.ai/docs/config-json/#autotuning
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.workload.script import MAPPED_KEYS
from ds_tune.tuner.request import TuneRequest

OF_OPTIONS = {"tuner_num_trials": "trials", "results_dir": "results", "metric": "metric"}
"""Keys that an option answers, which has a default of its own: only said."""


def with_autotuning_block(request: TuneRequest, block: Any) -> tuple[TuneRequest, list[str]]:
    """The request with what the block says, and lines on it for the person. What was asked for itself goes first.

    Raises:
        UsageError: the block says something that it cannot.
    """
    if not isinstance(block, Mapping):
        return request, []
    changes: dict[str, Any] = {}
    used = []
    mappings = block.get("arg_mappings") or {}
    if not isinstance(mappings, Mapping):
        raise UsageError("autotuning.arg_mappings of the DeepSpeed configuration must be an object")
    named = request.mapped
    added = tuple(
        f"{key}={option if str(option).startswith('-') else f'--{option}'}"
        for key, option in mappings.items()
        if key in MAPPED_KEYS and key not in named
    )
    if added:
        changes["map"] = (*request.map, *added)
        used.append("arg_mappings")
    for key, field in (
        ("max_train_micro_batch_size_per_gpu", "max_micro_batch"),
        ("max_train_batch_size", "max_global_batch"),
    ):
        value = block.get(key)
        if value in (None, "auto") or getattr(request, field) is not None:
            continue
        if field == "max_global_batch" and request.global_batch is not None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"autotuning.{key} of the DeepSpeed configuration must be a whole number from 1 on")
        changes[field] = value
        used.append(key)
    lines = [f"Taken from the autotuning block: {', '.join(used)}."] if used else []
    if options := [f"{key} (`{field}`)" for key, field in OF_OPTIONS.items() if key in block]:
        lines.append(f"Not taken from the autotuning block: {', '.join(options)}.")
    return dataclasses.replace(request, **changes), lines
