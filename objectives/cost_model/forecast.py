"""`Forecast`: what was believed of a configuration before it ran, kept to see afterwards how wrong it was."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Predicted figures of one configuration."""

    samples_per_second: float
    samples_per_second_ci95: tuple[float, float]
    peak_memory_bytes: float
    peak_memory_deviation_bytes: float
    """Standard deviation."""
    probability_of_fitting: float

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        return cls(**{**document, "samples_per_second_ci95": tuple(document["samples_per_second_ci95"])})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Excluded:
    """Configurations of one kind that were not launched because they certainly do not fit."""

    name: str
    """Name of the one with the smallest micro-batch."""
    predicted_peak_memory_bytes: float
    """Predicted bytes of that one."""
    configurations: int

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        return cls(**document)
