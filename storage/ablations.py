"""Contribution of each setting of the winner: the winner again, with that one setting as in the baseline."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from ds_tune.objectives.trial import Failure, FailureKind, Outcome, TrialConfig


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """The winner less one setting."""

    field: str
    """Name of a field of `TrialConfig`."""
    name: str
    """Name of the configuration."""
    value: int | str
    """Value of the field in it."""
    samples_per_second: float | None
    """None where it did not run."""
    winner_samples_per_second: float
    """The winner's in the same processes: two sessions on one machine may differ by more than a setting brings. Where
    something else uses the machine, the best of all its runs."""
    reason: str | None
    """Why it did not run."""
    noise: float | None = None
    """Half the 95% interval of the logarithm of the two rates' ratio; None in studies of earlier versions."""

    @classmethod
    def of(
        cls,
        field: str,
        config: TrialConfig,
        outcome: Outcome,
        *,
        samples_per_second: float | None,
        winner_samples_per_second: float,
        noise: float | None = None,
    ) -> Self:
        """From what that configuration did, in the study or after it."""
        reason = outcome.message if isinstance(outcome, Failure) else None
        if isinstance(outcome, Failure) and outcome.kind is FailureKind.OUT_OF_MEMORY:
            reason = "out of memory"
        return cls(
            field=field,
            name=config.name,
            value=getattr(config, field),
            samples_per_second=samples_per_second,
            winner_samples_per_second=winner_samples_per_second,
            reason=reason,
            noise=noise,
        )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        return cls(**document)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contributions:
    """Why the winner is fast: measured, or where that is too dear, as the study's trials let it be estimated."""

    winner: str
    ablations: tuple[Ablation, ...]
    importances: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Optuna's share of each searched field in the differences of throughput, where not all was ablated."""

    def to_json(self) -> dict[str, Any]:
        return {
            "winner": self.winner,
            "ablations": [each.to_json() for each in self.ablations],
            "importances": dict(self.importances),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        return cls(
            winner=document["winner"],
            ablations=tuple(Ablation.from_json(each) for each in document["ablations"]),
            importances=document["importances"],
        )
