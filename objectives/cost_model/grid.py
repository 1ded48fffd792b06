"""What is believed of many configurations before the first trial, as columns."""

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ds_tune.objectives.trial import CORE_FIELDS, TrialConfig

Floats: TypeAlias = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True)
class Grid:
    """The prior over many configurations, as columns; row i is `configs[i]`."""

    configs: tuple[TrialConfig, ...]
    ranks: int
    stage: Floats
    log2_micro_batch: Floats
    log2_accumulation: Floats
    knobs: npt.NDArray[np.int64]
    """A number for each combination of the other knobs that occurs."""
    log_rate: Floats
    """Predicted natural logarithm of samples/s."""
    launch_share: Floats
    """The part of the predicted step that launching kernels decides, likewise below."""
    communication_share: Floats
    optimizer_share: Floats
    states_bytes: Floats
    """Bytes of the states at the moment that is predicted to be the peak, likewise below."""
    activation_bytes: Floats
    peak_bytes: Floats
    large_bytes: Floats
    """Bytes of it that an allocator has to find in a few large pieces."""

    def __len__(self) -> int:
        return len(self.configs)


def knob_numbers(configs: Sequence[TrialConfig]) -> npt.NDArray[np.int64]:
    """A number for each combination of the knobs that occurs, one a configuration."""
    others = [
        tuple((name, value) for name, value in config.to_json().items() if name not in CORE_FIELDS)
        for config in configs
    ]
    numbers = {knobs: number for number, knobs in enumerate(dict.fromkeys(others))}
    return np.array([numbers[knobs] for knobs in others])
