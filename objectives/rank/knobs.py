"""The knobs that change how the model runs: applied before it is built, on it, and on its engine."""

import copy
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
import transformers

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.knobs import Scalar
from ds_tune.objectives.rank.attention import implementation_of
from ds_tune.objectives.rank.output_projection import pad_output_projection, take_loss_in_projection
from ds_tune.objectives.trial import KNOBS

DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob",
            "hidden_dropout", "attention_dropout", "resid_dropout", "embed_dropout", "dropout")  # fmt: skip
"""Names of the probabilities of dropping an activation, in the families of transformers."""


CAN_BE_LAID_ON = ("activation_checkpointing", "compile", "padded_vocabulary", "loss_computation", "attention")
"""Knobs of a model that is built already."""


def apply_knobs(model: torch.nn.Module, **knobs: Scalar) -> torch.nn.Module:
    """The model given, with knobs laid on it: for a training script of one's own, before `deepspeed.initialize` or
    before the Trainer is made. They are what `ds-tune` searches as `in_model`; see docs/knobs.md.

    >>> model = apply_knobs(model, compile="blocks", activation_checkpointing=1)

    Raises:
        UsageError: there is no such knob or value, or the model cannot have it.
    """
    for field, value in knobs.items():
        if field not in CAN_BE_LAID_ON:
            raise UsageError(f"{field} is no knob that a model can be given; there are {', '.join(CAN_BE_LAID_ON)}")
        try:
            KNOBS[field].checked(field, value)
        except ValueError as error:
            raise UsageError(str(error)) from None
    if knobs.get("compile") == "deepcompile":
        raise UsageError('compile="deepcompile" is of the engine: call engine.compile() behind deepspeed.initialize')
    lay_on(model, knobs)
    if knobs.get("compile") == "model":
        model.compile()
    return model


def lay_on(model: torch.nn.Module, knobs: Mapping[str, Any]) -> None:
    """Applies knobs to a model that somebody else has built, before its engine is made.

    Raises:
        UsageError: the model cannot do what a knob asks for.
    """
    if knobs.get("activation_checkpointing") == 0:
        model.gradient_checkpointing_disable()  # type: ignore[operator]
    elif "activation_checkpointing" in knobs:
        model.config.use_cache = False  # type: ignore[union-attr]
    if (attention := knobs.get("attention")) is not None:
        model.set_attn_implementation(implementation_of(attention))  # type: ignore[operator]
    apply_to_model(model, knobs)


def knobs_for(model: torch.nn.Module, *, is_loss_alone: bool) -> tuple[str, ...]:
    """Knobs that a model which is built already can be given.

    Args:
        is_loss_alone: nothing but the loss is read of what the model gives in training.
    """
    blocks = [module for module in model.modules() if isinstance(module, transformers.GradientCheckpointingLayer)]
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    # peft's models hand on what they lack to the model within.
    head = getattr(model, "get_output_embeddings", lambda: None)()
    is_whole = isinstance(model, transformers.PreTrainedModel)
    has_head = type(head) is torch.nn.Linear
    has = {
        "activation_checkpointing": bool(blocks) and getattr(model, "supports_gradient_checkpointing", False),
        "compile": bool(blocks) and not is_compiled,
        "padded_vocabulary": has_head,
        "loss_computation": has_head and is_whole and is_loss_alone,
        "attention": hasattr(model, "set_attn_implementation"),
    }
    return tuple(field for field in CAN_BE_LAID_ON if has[field])


def checkpoints_activations(model: torch.nn.Module) -> bool:
    """Whether a block of a model forgets its activations."""
    blocks = (module for module in model.modules() if isinstance(module, transformers.GradientCheckpointingLayer))
    return any(block.gradient_checkpointing for block in blocks)


def configure_model(config: transformers.PretrainedConfig, knobs: Mapping[str, Any]) -> transformers.PretrainedConfig:
    """The model's configuration under these knobs; the one given is left alone."""
    config = copy.deepcopy(config)
    if (attention := knobs.get("attention")) is not None:
        config._attn_implementation = implementation_of(attention)
    if multiple := knobs.get("vocabulary", 0):
        text = config.get_text_config()
        text.vocab_size += -text.vocab_size % multiple
    if knobs.get("dropout") == "none":
        for name in DROPOUTS:
            if isinstance(getattr(config, name, None), float):
                setattr(config, name, 0.0)
    return config


def apply_to_model(model: torch.nn.Module, knobs: Mapping[str, Any]) -> None:
    """Applies knobs to a model, before its engine is made.

    Raises:
        UsageError: the model cannot do what a knob asks for.
    """
    if every := knobs.get("activation_checkpointing", 0):
        checkpoint_activations(model, every)
    if multiple := knobs.get("padded_vocabulary", 0):
        pad_output_projection(model, multiple)
    if (loss := knobs.get("loss_computation")) is not None:
        take_loss_in_projection(model, loss)
    if knobs.get("compile") == "blocks":
        for block in transformer_blocks(model):
            # In place: parameters, hooks and names stay what they are.
            block.compile(dynamic=False)


def apply_to_engine(engine: deepspeed.DeepSpeedEngine, knobs: Mapping[str, Any]) -> None:
    """Applies knobs to an engine, before its first step."""
    if knobs.get("compile") in ("model", "deepcompile"):
        engine.compile()


def transformer_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that repeat, as transformers marks them.

    Raises:
        UsageError: it marks none in this model.
    """
    blocks = [module for module in model.modules() if isinstance(module, transformers.GradientCheckpointingLayer)]
    if not blocks:
        raise UsageError(f"transformers marks no repeating block in {type(model).__name__}; leave compile=blocks out")
    return blocks


def checkpoint_activations(model: torch.nn.Module, every: int) -> None:
    """Has every `every`-th transformer block forget its activations and compute them again in the backward pass.

    Raises:
        UsageError: transformers has no checkpointing for this model.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UsageError(f"{type(model).__name__} has no activation checkpointing in transformers; leave the knob out")
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    for number, block in enumerate(transformer_blocks(model)):
        block.gradient_checkpointing = number % every == 0  # type: ignore[assignment]


def parse_knobs(words: list[str]) -> dict[str, Any]:
    """Knobs from NAME=VALUE, as `cmd_optimal.txt` has them.

    Raises:
        ValueError: there is no such knob of the model, or no such value.
    """
    knobs: dict[str, Any] = {}
    for word in words:
        name, _, text = word.partition("=")
        entry = KNOBS.get(name)
        if entry is None or not entry.in_model:
            known = ", ".join(field for field, each in KNOBS.items() if each.in_model)
            raise ValueError(f"{word}: the model's knobs are {known}")
        if isinstance(entry.off, int):
            if not text.isdecimal():
                raise ValueError(f"{word}: {name} takes a whole number")
            knobs[name] = int(text)
        elif text in entry.values:
            knobs[name] = text
        else:
            raise ValueError(f"{word}: {name} is one of {', '.join(map(str, entry.values))}")
    return knobs
