"""A DeepSpeed file with "auto" in it, as transformers' Trainer takes it: with what was found, and "auto" kept.

The Trainer fills in each "auto" from its arguments and refuses a value that is another than theirs
(`HfTrainerDeepSpeedConfig.trainer_config_process` in transformers); the arguments that must follow are named here.
"""

import copy
from collections.abc import Mapping
from typing import Any

from ds_tune.objectives.ds_document import lay_knobs, merge, open_values, precision_of
from ds_tune.objectives.ds_file import AUTO, stated
from ds_tune.objectives.trial import TrialConfig

TRAINER_FILE = "ds_config_optimal_trainer.json"

ARGUMENTS = {
    "gradient_clipping": "max_grad_norm",
    "scheduler.params.warmup_max_lr": "learning_rate",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_num_steps": "warmup_steps",
}
"""Settings that the Trainer has an argument for, which must say the same."""


def has_open_values(document: Mapping[str, Any]) -> bool:
    """Whether a file is for the Trainer: something in it is left to its arguments."""
    return bool(open_values(document))


def trainer_file(document: Mapping[str, Any], config: TrialConfig, dtype: str) -> dict[str, Any]:
    """The person's file with a configuration laid on, and every "auto" that it does not decide.

    Batch sizes that the file has as numbers are numbers; the global batch is the Trainer's to multiply.

    Args:
        dtype: precision of the training.
    """
    laid: dict[str, Any] = copy.deepcopy(dict(document))
    for key in ("autotuning", "managed_gradient_accumulation"):
        laid.pop(key, None)
    for key, value in (
        ("train_micro_batch_size_per_gpu", config.micro_batch_size),
        ("gradient_accumulation_steps", config.gradient_accumulation_steps),
    ):
        laid[key] = AUTO if laid.get(key, AUTO) == AUTO else value
    laid["train_batch_size"] = AUTO
    if laid.get("zero_optimization") == AUTO:
        del laid["zero_optimization"]
    merge(laid, {"zero_optimization": {"stage": config.zero_stage}})
    lay_knobs(laid, config)
    trained = config.trained_dtype(dtype)
    if trained != "fp32" and precision_of(laid) != trained:
        block = laid.get(trained)
        laid[trained] = {**(block if isinstance(block, dict) else {}), "enabled": AUTO}
    return laid


def trainer_words(document: Mapping[str, Any], config: TrialConfig, dtype: str) -> list[str]:
    """The Trainer's arguments that must go with `trainer_file`, as options of transformers' examples."""
    words = ["--per_device_train_batch_size", str(config.micro_batch_size)]
    words += ["--gradient_accumulation_steps", str(config.gradient_accumulation_steps)]
    trained = config.trained_dtype(dtype)
    if trained != "fp32":
        words += [f"--{trained}", "True"]
    said: dict[str, str] = {}
    for name, argument in ARGUMENTS.items():
        value: Any = document
        for key in name.split("."):
            value = stated(value, key, None) if isinstance(value, Mapping) else None
        if isinstance(value, int | float):
            said[argument] = repr(value)
    for argument, text in said.items():
        words += [f"--{argument}", text]
    optimizer = stated(document, "optimizer", {})
    parameters = stated(optimizer, "params", {}) if isinstance(optimizer, Mapping) else {}
    betas = stated(parameters, "betas", None) if isinstance(parameters, Mapping) else None
    if isinstance(betas, list) and len(betas) == 2:
        words += ["--adam_beta1", repr(betas[0]), "--adam_beta2", repr(betas[1])]
    if config.activation_checkpointing == 1:
        words += ["--gradient_checkpointing", "True"]
    return words
