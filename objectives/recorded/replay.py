"""The objective that trains nothing: each configuration is answered with what was recorded of it."""

from collections.abc import Iterable
from pathlib import Path

from ds_tune.objectives.objective import OnPhase
from ds_tune.objectives.recorded.recording import Recording
from ds_tune.objectives.trial import Outcome, Provenance, TrialConfig


class ReplayObjective:
    """See `Objective`. It knows the recorded configurations only; a trial takes no time, whatever its outcome says."""

    provenance = Provenance.REPLAYED

    def __init__(self, recording: Recording) -> None:
        self._surface = recording

    def prepare(self, configs: Iterable[TrialConfig] = ()) -> None:
        """Nothing can be missing: the recording has been read."""

    def run(
        self,
        config: TrialConfig,
        folder: Path,
        on_phase: OnPhase,
        *,
        best_samples_per_second: float | None = None,
    ) -> Outcome:
        """See `Objective.run`. Nothing is stopped early: to read the rest of a recording costs nothing."""
        return self._surface.outcomes[config]

    def close(self) -> None:
        """Nothing was started."""
