"""Rows of a comparison in their order, and what each of them trains with."""

import dataclasses
import enum

from ds_tune.objectives.running.protocol import DEEPSPEED, VANILLA
from ds_tune.objectives.trial import Measurement, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload


class Row(enum.StrEnum):
    """One way to train, and to come by its configuration."""

    VANILLA = "vanilla"
    """Without DeepSpeed, mbs doubled until memory is out."""
    HAND_TUNED = "hand_tuned"
    """DeepSpeed's defaults at each ZeRO stage, mbs doubled until memory is out."""
    OWN = "own"
    """The person's DeepSpeed configuration as it is."""
    CORE = "core"
    """ds-tune over ZeRO stage, mbs and gas."""
    SPEED = "speed"
    """ds-tune also over what usually pays."""

    @property
    def words(self) -> str:
        return _TITLES[self]

    @property
    def trainer(self) -> str:
        return VANILLA if self is Row.VANILLA else DEEPSPEED

    @property
    def is_study(self) -> bool:
        """Whether a ds-tune study finds its configuration, rather than a sweep."""
        return self in (Row.CORE, Row.SPEED)


_TITLES = {
    Row.VANILLA: "baseline (vanilla HF)",
    Row.HAND_TUNED: "HF + DS hand-tuned",
    Row.OWN: "HF + DS, own configuration",
    Row.CORE: "HF + DS, ds-tune core",
    Row.SPEED: "HF + DS, ds-tune speed",
}


class Batch(enum.StrEnum):
    """Global batch of a table's rows."""

    FREE = "free"
    """Each row has its own."""
    ONE = "one"
    """The same for all rows."""


TRAINING_KEYS = ("optimizer", "scheduler", "gradient_clipping", "fp16", "bf16")
"""Keys of a DeepSpeed configuration that say what is trained, so that every row has them."""


def workload_of_row(row: Row, workload: HuggingFaceWorkload) -> HuggingFaceWorkload:
    """The training of a row: tuned by hand, all of the person's file that is not of the training itself is default."""
    if row is not Row.HAND_TUNED:
        return workload
    kept = {key: value for key, value in workload.base_ds_config.items() if key in TRAINING_KEYS}
    return dataclasses.replace(workload, base_ds_config=kept)


def base_of_row(row: Row, workload: HuggingFaceWorkload) -> str:
    """Name of what a row's configurations are laid over: rows of one name train the same with one configuration."""
    if row is Row.VANILLA:
        return VANILLA
    return DEEPSPEED if workload_of_row(row, workload) == workload else "deepspeed_defaults"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Configuration of a row, as its search found it."""

    row: Row
    config: TrialConfig
    search: Measurement
    base: str
    """What the configuration is laid over; see `base_of_row`."""

    @property
    def key(self) -> str:
        """Name of what runs again: one for all rows and tables of a model that choose the same."""
        return f"{self.base}/{self.config.name}"


def configuration_words(row: Row, config: TrialConfig) -> str:
    """Name of a configuration, which without DeepSpeed has no ZeRO stage."""
    return config.name.removeprefix("z0_") if row is Row.VANILLA else config.name
