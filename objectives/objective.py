"""Contract of whatever answers a search's trials."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, TypeAlias

from ds_tune.objectives.numerics import LossCurve
from ds_tune.objectives.trial import Failure, Outcome, Provenance, TrialConfig

OnPhase: TypeAlias = Callable[[str], None]
"""Told the phase that a running trial enters, for the live line."""


class Objective(Protocol):
    """Answers a configuration with an outcome: by running it, by a cost model, or from a recording."""

    @property
    def provenance(self) -> Provenance:
        """Origin of its outcomes' figures."""

    def prepare(self, configs: Iterable[TrialConfig] = ()) -> None:
        """Does what can be done before the first trial.

        Args:
            configs: all that may be run; what only some of them need is made ready as well.

        Raises:
            UsageError, EnvironmentFault: no trial could ever run; said before one is begun.
        """

    def run(
        self,
        config: TrialConfig,
        folder: Path,
        on_phase: OnPhase,
        *,
        best_samples_per_second: float | None = None,
    ) -> Outcome:
        """Answers one configuration.

        Args:
            folder: exists; whatever files the trial makes are there.
            best_samples_per_second: a trial that is clearly slower may be stopped; None to measure it in any case.
        """

    def close(self) -> None:
        """Gives everything back; nothing that was started is left."""


class TrainingObjective(Objective, Protocol):
    """An objective that really trains."""

    def losses(self, config: TrialConfig, folder: Path, on_phase: OnPhase) -> LossCurve | Failure:
        """Losses of a configuration's first steps; see `objectives.numerics`.

        Args:
            folder: exists; whatever files the run makes are there.
        """
