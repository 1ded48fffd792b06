"""`ModelFacts`: what a model is like that transformers has built, though the tuner itself imports no torch.

A short-lived process (`objectives.rank.describe`) builds the model without memory for its weights and says what there
is. It takes seconds, so that its answer is kept in memory and on disk
(docs/decisions/models-are-built-to-be-counted.md).
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_tune.objectives.errors import UsageError

DESCRIBE_MODULE = "ds_tune.objectives.rank.describe"
DESCRIBE_SECONDS = 300
"""Seconds after which the process is given up: the largest models take about ten."""
SOURCES = ("describe.py", "model_config.py", "experts.py")
"""Files in `objectives/rank` that decide what the process says: an answer on disk is of these as they are."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What is trained of a configuration, and its sizes."""

    model_type: str
    trained_class: str
    """Name of transformers' class that is trained."""
    named_class: str | None
    """Class that the configuration names, where another is trained."""
    is_masked: bool
    positions: int | None
    """Tokens that a sample may have; None where there is no limit."""
    parameters: int
    parameters_per_token: int
    """Parameters that one token is multiplied with: the experts that it goes to, and a shared layer each time."""
    block_parameters: int
    """Parameters of the largest block that repeats."""
    block_matrices: int
    layers: int
    hidden: int
    heads: int
    """0 where there is no attention."""
    key_value_heads: int
    head_dim: int
    intermediate: int
    """Width of the MLP; with experts, of all that one token goes to."""
    vocabulary: int
    gated_mlp: bool
    unfused_activation: bool
    rms_norm: bool
    dropout: bool
    relative_columns: int


def facts_of(document: Mapping[str, Any], model: str) -> ModelFacts | None:
    """The facts of a model's configuration in transformers' JSON form; None where the process that says them died.

    Raises:
        UsageError: the model cannot be trained here; the text says why and what to do.
    """
    said = _answer(json.dumps(document, sort_keys=True))
    if said is None:
        return None
    if (refusal := said.get("refused")) is not None:
        raise UsageError(f"`model={model}`{refusal}")
    return ModelFacts(**said["facts"])


@functools.lru_cache
def _answer(document: str) -> dict[str, Any] | None:
    kept_in = _cache_file(document)
    try:
        answer: dict[str, Any] = json.loads(kept_in.read_text())
        return answer
    except (OSError, ValueError):
        pass
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        ended = subprocess.run(
            [sys.executable, "-P", "-m", DESCRIBE_MODULE], input=document, env=environment,
            capture_output=True, text=True, timeout=DESCRIBE_SECONDS,
        )  # fmt: skip
        answer = json.loads(ended.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return None
    if "facts" in answer:
        _keep(kept_in, answer)
    return answer


def _cache_file(document: str) -> Path:
    """File of the answer for a configuration, this code and the installed transformers."""
    key = hashlib.sha256(document.encode())
    key.update(importlib.metadata.version("transformers").encode())
    for name in SOURCES:
        key.update((Path(__file__).parents[1] / "rank" / name).read_bytes())
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(folder, "ds-tune", "models", f"{key.hexdigest()}.json")


def _keep(path: Path, answer: Mapping[str, Any]) -> None:
    # Without a home that can be written to the next command asks again.
    written = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(json.dumps(answer))
        written.replace(path)
    except OSError:
        pass
