"""Ways by which a trial's settings reach a script that does not read them from its arguments.

The arguments come first (`ScriptWorkload.started_with`): they steer the script's own logic, and are what a person will
type. What is here replaces a value where a library takes it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate.utils.deepspeed
import deepspeed
import transformers

from ds_tune.objectives.ds_config import dtype_of, overlaid
from ds_tune.objectives.rank.script.replaced import around
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.script_facts import ACCELERATE, PLAIN, TRAINER


class Settings:
    """DeepSpeed settings of one run: what the person wrote, and what the trial makes of it."""

    def __init__(self, config: TrialConfig | None, ranks: int) -> None:
        """
        Args:
            config: the trial; None to run the script as it stands.
        """
        self._config = config
        self._ranks = ranks
        self.loop = PLAIN
        self.is_loss_alone = False
        """Nothing but the loss is read of what the model gives: by the Trainer's own loop, in which nothing was
        overridden."""
        self.written: dict[str, Any] = {}
        """The configuration as the person wrote it."""
        self._laid: list[dict[str, Any]] = []
        """Documents that are laid over already: they come by again on their way to the engine."""

    def install(self) -> None:
        """Called before the script begins."""
        around(accelerate.utils.deepspeed.HfDeepSpeedConfig, "__init__", self._hugging_face)
        around(transformers.TrainingArguments, "__post_init__", self._training_arguments)
        around(transformers.Trainer, "train", self._train)
        around(deepspeed.zero.Init, "__init__", self._zero_init)

    def engine_config(self, given: Any) -> Any:
        """What `deepspeed.initialize` gets in place of the configuration that it was given."""
        document = _document(given)
        if document is None or self.loop != PLAIN:
            return given
        return self._laid_over(document)

    def _hugging_face(self, original: Any, config: Any, given: Any) -> None:
        if self.loop == PLAIN:
            self.loop = ACCELERATE
        document = _document(given)
        original(config, given if document is None else self._laid_over(document))

    def _training_arguments(self, original: Any, arguments: transformers.TrainingArguments) -> None:
        self.loop = TRAINER
        if self._config is not None:
            arguments.per_device_train_batch_size = self._config.micro_batch_size
            arguments.gradient_accumulation_steps = self._config.gradient_accumulation_steps
        original(arguments)

    def _train(self, original: Any, trainer: transformers.Trainer, *args: Any, **kwargs: Any) -> Any:
        owner = transformers.Trainer
        self.is_loss_alone = (
            type(trainer).compute_loss is owner.compute_loss and type(trainer).training_step is owner.training_step
        )
        return original(trainer, *args, **kwargs)

    def _zero_init(self, original: Any, init: Any, *args: Any, **kwargs: Any) -> None:
        if self._config is not None and self._config.zero_stage != 3:
            kwargs["enabled"] = False
        given = kwargs.get("config_dict_or_path")
        if self._config is not None and (document := _document(given)) is not None:
            kwargs["config_dict_or_path"] = self._laid_over(document)
        original(init, *args, **kwargs)

    def _laid_over(self, document: dict[str, Any]) -> dict[str, Any]:
        if any(document == each for each in self._laid):
            return document
        self.written = self.written or document
        if self._config is None:
            return document
        laid = overlaid(document, self._config, ranks=self._ranks, keeps_auto=self.loop == TRAINER)
        self._laid.append(laid)
        return laid


def _document(given: Any) -> dict[str, Any] | None:
    """The configuration that an argument is, or names."""
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, str | Path) and Path(given).is_file():
        read: dict[str, Any] = json.loads(Path(given).read_text())
        return read
    return None


def engine_dtype(engine: deepspeed.DeepSpeedEngine) -> str:
    """Precision that an engine trains in."""
    enabled = {"fp16": engine.fp16_enabled(), "bf16": engine.bfloat16_enabled()}
    return dtype_of({name: {"enabled": is_on} for name, is_on in enabled.items()})
