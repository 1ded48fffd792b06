"""A person's DeepSpeed configuration: what it says of knobs and precision, and what a trial changes in it."""

import copy
from collections.abc import Collection, Mapping
from typing import Any

from ds_tune.objectives.ds_file import AUTO, stated
from ds_tune.objectives.knobs import Scalar
from ds_tune.objectives.trial import KNOBS, TrialConfig

NEVER_PRINT = 1_000_000_000

MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")
DEBUGGING = ("wall_clock_breakdown", "memory_breakdown", "dump_state", "flops_profiler", "comms_logger")
ZERO_DEBUGGING = ("enable_sanity_checks", "log_trace_cache_warnings")
"""Settings of `zero_optimization` that only check or print."""

WRITTEN_BY_FILE = ("offload_optimizer", "offload_parameters")
"""Knobs that a configuration of one's own may have on: a trial has such a setting by the knob alone."""

_OFFLOAD = {
    "offload_optimizer": ("offload_optimizer", "cpu_offload"),
    "offload_parameters": ("offload_param", "cpu_offload_param"),
}
"""Keys of `zero_optimization` that a knob stands for, the old one last."""


def knobs_of(document: Mapping[str, Any], *, zero_stage: int) -> dict[str, Scalar]:
    """Knobs that a configuration has on at its ZeRO stage, as far as they have a place in DeepSpeed's file.

    An offload to NVMe is no knob, nor one at a stage where DeepSpeed has none.
    """
    zero = document.get("zero_optimization")
    if not isinstance(zero, Mapping):
        return {}
    found: dict[str, Scalar] = {}
    for field, (key, old) in _OFFLOAD.items():
        block = zero.get(key)
        device = (
            stated(block, "device", "none") if isinstance(block, Mapping) else "cpu" if zero.get(old) is True else ""
        )
        if device == "cpu" and zero_stage >= (3 if field == "offload_parameters" else 1):
            found[field] = "cpu"
            ratio = stated(block, "ratio", 1) if isinstance(block, Mapping) else 1
            if field == "offload_optimizer" and zero_stage == 3 and isinstance(ratio, int | float) and ratio < 1:
                found[field] = "cpu_half"
    return found


def lay_knobs(document: dict[str, Any], config: TrialConfig, *, kept: Collection[str] = ()) -> None:
    """Has a document say the knobs of a configuration: what it says of one already stays, and goes where that is off.

    Args:
        kept: knobs that are none here: what the document says of them stays whatever the configuration has.
    """
    on = config.knobs_on
    said = knobs_of(document, zero_stage=config.zero_stage)
    for field in WRITTEN_BY_FILE:
        if field not in kept and (field not in on or said.get(field) != on[field]):
            _forget(document, field)
    for field, value in on.items():
        writes = KNOBS[field].writes
        if writes is not None and not (field in WRITTEN_BY_FILE and said.get(field) == value):
            merge(document, writes(value))


def _forget(document: dict[str, Any], field: str) -> None:
    """Takes what a knob stands for out of a document; an offload to somewhere else than the host is not one."""
    zero = document.get("zero_optimization")
    if not isinstance(zero, dict):
        return
    key, old = _OFFLOAD[field]
    if not (isinstance(block := zero.get(key), Mapping) and block.get("device") not in ("cpu", "none", None)):
        zero.pop(key, None)
    zero.pop(old, None)


def precision_of(document: Mapping[str, Any]) -> str | None:
    """Precision that a configuration says, `fp16`, `bf16` or `fp32`; None where it leaves it open."""
    enabled = {}
    for name in ("fp16", "bf16"):
        block = document.get(name)
        if isinstance(block, Mapping):
            enabled[name] = block.get("enabled", False)
        elif block == AUTO:
            enabled[name] = AUTO
    on = [name for name, value in enabled.items() if value is True]
    if on:
        return on[0]
    return "fp32" if len(enabled) == 2 and AUTO not in enabled.values() else None


def switched_off(document: Mapping[str, Any]) -> list[str]:
    """Settings that are on in a configuration and off in trials: monitors, profilers and what prints."""
    found = [key for key in (*MONITORS, *DEBUGGING) if _is_on(document.get(key))]
    steps = document.get("steps_per_print")
    if isinstance(steps, int | float) and 0 < steps < NEVER_PRINT:
        found.append("steps_per_print")
    zero = document.get("zero_optimization")
    if isinstance(zero, Mapping):
        found += [f"zero_optimization.{key}" for key in ZERO_DEBUGGING if zero.get(key)]
    return found


def _is_on(setting: Any) -> bool:
    return bool(setting.get("enabled")) if isinstance(setting, Mapping) else bool(setting)


def quieten(document: dict[str, Any]) -> None:
    """Takes out of a document what `switched_off` names."""
    for key in (*MONITORS, *DEBUGGING):
        document.pop(key, None)
    if "steps_per_print" in document:
        document["steps_per_print"] = NEVER_PRINT
    if isinstance(zero := document.get("zero_optimization"), dict):
        for key in ZERO_DEBUGGING:
            zero.pop(key, None)


def open_values(document: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of the settings that are `"auto"`, such as `optimizer.params.lr`."""
    found = []
    for key, value in document.items():
        if isinstance(value, Mapping):
            found += open_values(value, f"{prefix}{key}.")
        elif value == AUTO:
            found.append(f"{prefix}{key}")
    return found


def has_open_schedule(document: Mapping[str, Any]) -> bool:
    """Whether a scheduler has values that only the Trainer knows, such as its number of steps."""
    scheduler = document.get("scheduler")
    return scheduler == AUTO or (isinstance(scheduler, Mapping) and bool(open_values(scheduler)))


def without_open_values(document: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without the values `"auto"`, which transformers' Trainer fills in and DeepSpeed refuses."""
    kept: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            kept[key] = without_open_values(value)
        elif value != AUTO:
            kept[key] = copy.deepcopy(value)
    return kept


def merge(document: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Lays settings over a document, block by block."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and isinstance(document.get(key), dict):
            merge(document[key], value)
        else:
            document[key] = copy.deepcopy(value)
