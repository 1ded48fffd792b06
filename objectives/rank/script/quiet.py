"""What a person's script writes, sends and tests besides its training is left out of trials.

Checkpoints, uploads, trackers and evaluation: of no use to a timing, and nothing of a trial may be left behind.
"""

import os
from pathlib import Path
from typing import Any

import accelerate
import deepspeed
import transformers

from ds_tune.objectives.rank.script.hub import leave_out_uploads
from ds_tune.objectives.rank.script.replaced import around, silence

TRACKERS_OFF = {
    "WANDB_MODE": "disabled",
    "WANDB_DISABLED": "true",
    "COMET_MODE": "disabled",
    "DISABLE_MLFLOW_INTEGRATION": "TRUE",
    "CLEARML_LOG_MODEL": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

MANY_STEPS = 1_000_000_000
"""Longer than any trial: data is iterated as often as it takes."""


def leave_out_side_effects(scratch: Path) -> None:
    """Called before the script begins.

    Args:
        scratch: folder for what it insists on writing.
    """
    os.environ.update(TRACKERS_OFF)
    silence(deepspeed.DeepSpeedEngine, "save_checkpoint", "save_16bit_model", "save_fp16_model")
    silence(accelerate.Accelerator, "init_trackers", "log", "save_state", "save_model")
    for each in (
        transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase, transformers.PreTrainedConfig,
        transformers.GenerationConfig, transformers.ProcessorMixin,
    ):  # fmt: skip
        silence(each, "save_pretrained", "push_to_hub")
    silence(transformers.Trainer, "save_model", "save_state", "push_to_hub", "create_model_card", "init_hf_repo")
    leave_out_uploads()
    around(transformers.TrainingArguments, "__post_init__", _quiet_arguments(scratch))
    around(transformers.Trainer, "train", _from_the_start)


def _quiet_arguments(scratch: Path) -> Any:
    def post_init(original: Any, arguments: transformers.TrainingArguments) -> None:
        arguments.output_dir = str(scratch)
        arguments.report_to = []
        arguments.push_to_hub = False
        arguments.auto_find_batch_size = False
        arguments.resume_from_checkpoint = None
        arguments.max_steps = MANY_STEPS
        original(arguments)
        # Behind its own checks, some of which compare these with each other.
        arguments.save_strategy = transformers.trainer_utils.SaveStrategy.NO
        arguments.eval_strategy = transformers.trainer_utils.IntervalStrategy.NO
        arguments.do_eval = False
        arguments.eval_on_start = False
        arguments.load_best_model_at_end = False

    return post_init


def _from_the_start(original: Any, trainer: transformers.Trainer, *args: Any, **kwargs: Any) -> Any:
    kwargs.pop("resume_from_checkpoint", None)
    return original(trainer, **kwargs)
