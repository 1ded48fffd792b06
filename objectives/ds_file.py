"""A person's DeepSpeed file: read as DeepSpeed reads it, its old forms as they are written today, and its mistakes."""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import hjson

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.words import shown

AUTO = "auto"
"""Value that transformers' Trainer fills in."""

MOST_CHARACTERS = 1_000_000
"""Characters above which a text that is no JSON is not a configuration that a person wrote; hjson is slow."""

MOST_ELEMENTS = 2**63
"""More than any bucket has; beyond, a number is a slip or an infinity."""

BLOCKS = (
    "activation_checkpointing", "aio", "checkpoint", "comet", "comms_logger", "compile", "csv_monitor",
    "data_efficiency", "data_types", "expert_parallel", "flops_profiler", "hybrid_engine", "optimizer", "pipeline",
    "scheduler", "tensor_parallel", "tensorboard", "timers", "torch_autocast", "wandb", "weight_quantization",
    "zero_optimization", "fp16", "bf16",
)  # fmt: skip
"""Keys of DeepSpeed's whose value is an object; DeepSpeed takes neither null nor a boolean there."""

KNOWN_KEYS = frozenset(
    {
        *BLOCKS,
        "autotuning", "bfloat16", "communication_data_type", "dataloader_drop_last", "datastates_ckpt",
        "disable_allgather", "disable_python_gc", "dump_state", "gradient_accumulation_steps",
        "gradient_allreduce_op", "gradient_clipping", "gradient_predivide_factor", "log_level",
        "managed_gradient_accumulation", "memory_breakdown", "prescale_gradients",
        "seq_parallel_communication_data_type", "sequence_parallel_size", "steps_per_print", "train_batch_size",
        "train_micro_batch_size_per_gpu", "use_data_before_expert_parallelism", "vocabulary_size",
        "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
        # Refused by name: its features that are gone.
        "amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting", "nebula",
        "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients",
        "allgather_size",  # beside a boolean for `zero_optimization`
    }
)  # fmt: skip
"""Keys of a configuration that DeepSpeed 0.19 looks for; `tests/objectives/test_ds_file.py` asks it."""

_NUMBERS = ("gradient_clipping", "gradient_predivide_factor")
_WHOLE_NUMBERS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_ENABLED = {"true": True, "false": False}
_NUMERIC_PARAMETERS = ("lr", "eps", "weight_decay", "momentum")


class DuplicateKeys(ValueError):
    """Keys that an object has twice."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DsFile:
    """What a file says."""

    document: dict[str, Any]
    """In DeepSpeed's present form, values `"auto"` and all."""
    rewritten: tuple[str, ...]
    """Settings that are written otherwise in the file, in words."""


def parsed(text: str) -> Any:
    """Returns what DeepSpeed reads in a text: JSON with comments, trailing commas and a byte order mark.

    Raises:
        ValueError: it is none; `DuplicateKeys` where an object has a key twice, which DeepSpeed refuses.
        RecursionError: it is too deep.
    """
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except DuplicateKeys:
        raise
    except ValueError:
        if len(text) > MOST_CHARACTERS or not text.strip():
            raise
    return hjson.loads(text, object_pairs_hook=_distinct)


def _distinct(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = ", ".join(dict.fromkeys(name for name in names if names.count(name) > 1))
        raise DuplicateKeys(f"it has {twice} twice, which DeepSpeed refuses")
    return found


def read_ds_file(path: Path) -> DsFile:
    """Reads the user's DeepSpeed configuration for `ds_config`.

    Raises:
        UsageError: the file is missing, is no JSON, or is no DeepSpeed configuration.
    """
    try:
        document = parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"`ds_config={path}` cannot be read ({error.strerror})") from error
    except DuplicateKeys as error:
        raise UsageError(f"`ds_config={path}`: {error}; leave one out") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"`ds_config={path}` is not JSON ({' '.join(str(error).split())})") from error
    if not isinstance(document, dict):
        raise UsageError(f"`ds_config={path}` must hold a JSON object")
    if not KNOWN_KEYS & set(document) and {"model_type", "architectures"} & set(document):
        raise UsageError(f"`ds_config={path}` is the configuration of a model; give it as `model`")
    document, rewritten = _in_present_form(document)
    if (mistake := _mistake_in(document)) is not None:
        raise UsageError(f"`ds_config={path}`: {mistake}")
    return DsFile(document=document, rewritten=tuple(rewritten))


def load_base_ds_config(path: Path) -> dict[str, Any]:
    """The document of `read_ds_file`, which see."""
    return read_ds_file(path).document


def unknown_keys(document: Mapping[str, Any]) -> list[str]:
    """Top-level keys that DeepSpeed ignores, each with the one that may be meant; comments are none."""
    found = []
    for key in document:
        if key not in KNOWN_KEYS and not key.startswith(("_", "#", "//")):
            near = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
            found.append(f"{key} (is {near[0]} meant?)" if near else key)
    return found


def _in_present_form(document: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A document as it is written today, and what was written otherwise.

    Old forms are those that DeepSpeed still reads (`runtime/zero/config.py`, `runtime/precision_config.py`); numbers in
    quotes it takes at some places and trips over at others.
    """
    found, said = dict(document), []
    if isinstance(zero := found.get("zero_optimization"), bool):
        found["zero_optimization"] = {"stage": int(zero)}
        if zero:
            found["zero_optimization"]["allgather_bucket_size"] = found.get("allgather_size", 500_000_000)
        found.pop("allgather_size", None)
        said.append(f"zero_optimization {str(zero).lower()} is stage {int(zero)}")
    old = found.pop("bfloat16", None)
    if found.get("bf16") is None:
        found.pop("bf16", None)
        if old is not None:
            found["bf16"] = old
            said.append("bfloat16 is bf16")
    if isinstance(found.get("zero_optimization"), Mapping):
        found["zero_optimization"] = zero = dict(found["zero_optimization"])
        pinned = zero.pop("cpu_offload_use_pin_memory", None)
        for name, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
            value = zero.pop(name, None)
            if value in (True, "true") and not zero.get(new):
                zero[new] = {"device": "cpu"} | ({"pin_memory": pinned} if isinstance(pinned, bool) else {})
                said.append(f"{name} is {new}")
    for key in (*_NUMBERS, *_WHOLE_NUMBERS):
        if key in found:
            found[key] = _as_number(found[key], key, said, is_whole=key in _WHOLE_NUMBERS)
    for key in ("zero_optimization", "fp16", "bf16"):
        if isinstance(found.get(key), Mapping):
            found[key] = _as_number(found[key], key, said, is_whole=True)
    for key in ("optimizer", "scheduler"):
        if isinstance(block := found.get(key), Mapping) and isinstance(block.get("params"), Mapping):
            found[key] = {**block, "params": _as_number(block["params"], f"{key}.params", said)}
    return found, said


def _as_number(value: Any, name: str, said: list[str], *, is_whole: bool = False) -> Any:
    """A value with numbers and booleans in place of texts that are such, at any depth.

    Args:
        is_whole: turn 4.0 into 4.
    """
    if isinstance(value, Mapping):
        return {key: _as_number(each, f"{name}.{key}", said, is_whole=is_whole) for key, each in value.items()}
    if isinstance(value, list):
        return [_as_number(each, name, said, is_whole=is_whole) for each in value]
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in _ENABLED:
            said.append(f'{name} "{text}" is {text.lower()}')
            return _ENABLED[text.lower()]
        if not _NUMBER.fullmatch(text):
            return value
        said.append(f'{name} "{text}" is a number')
        value = float(text) if any(sign in text for sign in ".eE") else int(text)
    if is_whole and isinstance(value, float) and value.is_integer() and abs(value) < MOST_ELEMENTS:
        return int(value)
    return value


def stated(block: Mapping[str, Any], key: str, default: Any) -> Any:
    """A value of a block, or the default where it is left open: not there, or `"auto"`."""
    value = block.get(key, default)
    return default if value == AUTO else value


def _mistake_in(document: Mapping[str, Any]) -> str | None:
    """A setting that is of another type than it must be, among those that ds-tune itself reads or writes into.

    The rest is DeepSpeed's to judge. A value `"auto"` is as good as none: `objectives.ds_config` leaves it out.
    """
    for section in BLOCKS:
        if not isinstance(stated(document, section, {}), dict):
            return f"{section} must be an object (leave it out where there is nothing to say)"
    zero, optimizer = stated(document, "zero_optimization", {}), stated(document, "optimizer", None)
    for name in ("offload_optimizer", "offload_param"):
        if not isinstance(stated(zero, name, {}), dict | None):
            return f"zero_optimization.{name} must be an object"
    stage = stated(zero, "stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        return f"zero_optimization.stage is 0, 1, 2 or 3, not {shown(stage)}"
    bucket = stated(zero, "reduce_bucket_size", 0)
    if isinstance(bucket, int | float) and not 0 <= bucket < MOST_ELEMENTS:
        return f"zero_optimization.reduce_bucket_size must be a number of elements, not {bucket}"
    for key in _WHOLE_NUMBERS:
        size = stated(document, key, 1)
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            return f"{key} must be a whole number from 1 on, not {shown(size)}"
    if optimizer is not None:
        if not isinstance(stated(optimizer, "type", None), str):
            return 'optimizer.type must be the name of an optimizer, such as "AdamW"'
        parameters = stated(optimizer, "params", {})
        if not isinstance(parameters, dict):
            return "optimizer.params must be an object"
        for key in _NUMERIC_PARAMETERS:
            value = stated(parameters, key, 0)
            if isinstance(value, bool) or not isinstance(value, int | float):
                return f"optimizer.params.{key} must be a number, not {shown(value)}"
    clipping = stated(document, "gradient_clipping", 0)
    if isinstance(clipping, bool) or not isinstance(clipping, int | float) or not clipping >= 0:
        return "gradient_clipping must be a number from 0 on"
    return _both_precisions(document) or _shared_samples(document)


def _both_precisions(document: Mapping[str, Any]) -> str | None:
    both = all(stated(stated(document, name, {}), "enabled", False) is True for name in ("fp16", "bf16"))
    return "fp16 and bf16 are both enabled, which DeepSpeed refuses; leave out one" if both else None


def _shared_samples(document: Mapping[str, Any]) -> str | None:
    """Settings by which several ranks train on the same samples, which no figure here is made for."""
    tensor = stated(document, "tensor_parallel", {})
    inner = tensor.get("tp") if isinstance(tensor.get("tp"), Mapping) else {}
    sizes = {
        "tensor_parallel.autotp_size": tensor.get("autotp_size"),
        "tensor_parallel.tp_size": tensor.get("tp_size"),
        "tensor_parallel.tp.tp_size": inner.get("tp_size"),
        "sequence_parallel_size": document.get("sequence_parallel_size"),
        "pipeline.stages": stated(document, "pipeline", {}).get("stages"),
    }
    for name, size in sizes.items():
        if isinstance(size, int) and size > 1:
            return f"{name} has ranks share samples, which ds-tune cannot tune yet; leave it out"
    return None


def shared_samples(document: Mapping[str, Any]) -> str | None:
    """The setting of a script's configuration by which ranks share samples, in a sentence; None where there is none."""
    blocks = ("tensor_parallel", "pipeline")
    return _shared_samples(
        {key: value for key, value in document.items() if key not in blocks or isinstance(value, dict)}
    )
