"""The model of a configuration in its DeepSpeed engine."""

from collections.abc import Mapping
from typing import Any, Protocol

import deepspeed

from ds_tune.objectives.ds_config import deepspeed_config
from ds_tune.objectives.rank.knobs import apply_to_engine, apply_to_model, configure_model
from ds_tune.objectives.rank.model import build_model, count_parameters, flops_per_sample
from ds_tune.objectives.rank.ops import COMPILE_SECONDS, KNOB_OPS, load_knob_op
from ds_tune.objectives.rank.resources import RankResources
from ds_tune.objectives.timing.deadlines import BUILD_SECONDS, predicted_step_seconds
from ds_tune.objectives.trial import TrialConfig


class Destroyable(Protocol):
    """An engine that gives back what it holds."""

    def destroy(self) -> object: ...


class EngineSlot:
    """Place of a trial's engine: filled as soon as the engine exists, emptied by whoever releases it.

    However a trial ends, by an exception in the middle of building too, its engine is found here.
    """

    def __init__(self) -> None:
        self.engine: Destroyable | None = None

    def take(self) -> Destroyable | None:
        """Returns the engine, and holds it no longer."""
        engine, self.engine = self.engine, None
        return engine


def build_engine(
    config: TrialConfig, rank: RankResources, slot: EngineSlot, *, knobs: Mapping[str, Any] | None = None
) -> tuple[deepspeed.DeepSpeedEngine, int]:
    """Returns the engine of a configuration, and how many parameters its model has.

    Args:
        knobs: knobs of the model that overrule the configuration's own.
    """
    progress = rank.progress
    progress.announce("config", seconds=BUILD_SECONDS["config"])
    ds_config = deepspeed_config(config, rank.workload, ranks=rank.machine.ranks, device=rank.machine.device)
    deepspeed.DeepSpeedConfig(ds_config)  # a mistake is found here, before a model is built
    in_model = {**config.model_knobs, **(knobs or {})}
    for knob in {**config.knobs_on, **in_model}.items():
        if knob in KNOB_OPS:
            progress.announce("compile", seconds=COMPILE_SECONDS)
            load_knob_op(*knob, progress.notice)
    progress.announce("model", seconds=BUILD_SECONDS["model"])
    model = build_model(rank.workload, configure_model(rank.model_config, in_model), ds_config, rank.device)
    apply_to_model(model, in_model)
    parameters = count_parameters(model)
    progress.announce("engine", seconds=BUILD_SECONDS["engine"])
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds_config)
    slot.engine = engine
    apply_to_engine(engine, in_model)
    return engine, parameters


def predict_step_seconds(
    config: TrialConfig, rank: RankResources, parameters: int, seconds_per_sample: float | None
) -> float:
    """Seconds of an optimizer step, rather too many; see `predicted_step_seconds`."""
    return predicted_step_seconds(
        samples=config.micro_batch_size * config.gradient_accumulation_steps,
        seconds_per_sample=seconds_per_sample,
        flops_per_sample=flops_per_sample(rank.model_config, parameters, rank.workload.seq_len),
        device=rank.machine.device,
    )
