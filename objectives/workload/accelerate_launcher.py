"""Settings of DeepSpeed that `accelerate launch` hands a script: in its YAML, or as options of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ds_tune.objectives.trial import TrialConfig

CONFIG_OPTION = "--config_file"
OPTIMAL_YAML = "accelerate_optimal.yaml"


def is_accelerate(launcher: Sequence[str]) -> bool:
    return bool(launcher) and Path(launcher[0]).name == "accelerate"


def config_file(launcher: Sequence[str]) -> int | None:
    """Index of the word that names the YAML, which may be `--config_file=FILE`."""
    for index, word in enumerate(launcher):
        if word == CONFIG_OPTION and index + 1 < len(launcher):
            return index + 1
        if word.startswith(f"{CONFIG_OPTION}="):
            return index
    return None


def tuned_yaml(text: str, config: TrialConfig) -> str:
    """The YAML with a configuration's stage and accumulation, and all else as it is."""
    document: dict[str, Any] = yaml.safe_load(text)
    document["deepspeed_config"] = {
        **(document.get("deepspeed_config") or {}),
        "zero_stage": config.zero_stage,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
    }
    return yaml.safe_dump(document, sort_keys=False)


def tuned_launcher(launcher: Sequence[str], folder: Path, config: TrialConfig) -> list[str]:
    """The launcher's words with a configuration in them.

    Args:
        folder: where `OPTIMAL_YAML` is.
    """
    words = list(launcher)
    if (index := config_file(launcher)) is not None:
        option, equals, _ = words[index].rpartition("=")
        words[index] = f"{option}{equals}{folder / OPTIMAL_YAML}"
        return words
    for option, value in (
        ("--zero_stage", config.zero_stage),
        ("--gradient_accumulation_steps", config.gradient_accumulation_steps),
    ):
        if option in words[:-1]:
            words[words.index(option) + 1] = str(value)
        else:
            words = [word for word in words if not word.startswith(f"{option}=")]
            words += [option, str(value)]
    return words
