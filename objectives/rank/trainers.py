"""What builds the engine of each trainer."""

from collections.abc import Callable
from typing import Any

from ds_tune.objectives.rank.engine import build_engine
from ds_tune.objectives.rank.vanilla import build_vanilla_engine
from ds_tune.objectives.running.protocol import DEEPSPEED, VANILLA

BUILDERS: dict[str, Callable[..., tuple[Any, int]]] = {DEEPSPEED: build_engine, VANILLA: build_vanilla_engine}
"""Builders by the trainer's name; `build_engine` says what they take and return."""
