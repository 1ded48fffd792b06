"""What the search asks of whatever answers its trials."""

from pathlib import Path
from typing import Protocol

from objectives.rank_group import OnPhase
from objectives.trial import Outcome, TrialConfig


class Objective(Protocol):
    """Answers a configuration with an outcome: by running it, by a cost model, or from a recording."""

    def prepare(self) -> None:
        """Does what can be done before the first configuration is known.

        Raises:
            UsageError, EnvironmentFault: no trial could ever run; said before one is begun.
        """

    def run(self, config: TrialConfig, folder: Path, on_phase: OnPhase) -> Outcome:
        """Answers one configuration; whatever files it makes are in `folder`, which exists."""

    def close(self) -> None:
        """Gives everything back; nothing that was started is left."""
