"""Knobs laid on the model that a script hands to DeepSpeed, whoever owns the loop."""

from collections.abc import Callable, Mapping
from typing import Any

import deepspeed

from ds_tune.objectives.rank.knobs import apply_to_engine, lay_on
from ds_tune.objectives.rank.script.replaced import around


def lay_on_what_trains(knobs: Mapping[str, Any]) -> None:
    """Has the first model that an engine is to train get these knobs. Called before the script begins."""
    done = False

    def initialize(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal done
        if done or not is_to_train(args, kwargs):
            return original(*args, **kwargs)
        done = True
        lay_on(kwargs["model"] if "model" in kwargs else args[1], knobs)
        made = original(*args, **kwargs)
        apply_to_engine(made[0], knobs)
        return made

    around(deepspeed, "initialize", initialize)


def is_to_train(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of `deepspeed.initialize` with these arguments makes an engine that trains."""
    return any(kwargs.get(name) is not None for name in ("optimizer", "model_parameters")) or len(args) > 2
