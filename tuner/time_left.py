"""How long a study will still take: an estimate from the runs so far."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

ASSUMED_TRIAL_SECONDS = 10.0
"""A trial's, before one has ended: GPT2-xl's on two H100s. One that runs longer corrects it while it runs."""

FRESH_FACTOR = 1.5
"""A run in fresh processes against one in processes that live on, before there was one."""

VERIFICATION_RUNS = 7
"""Three finalists twice and the baseline once."""

EXPLANATION_RUNS = 6
"""Two whose losses are compared; the winner again, and without each of three settings."""


@dataclasses.dataclass(frozen=True, slots=True)
class RunsLeft:
    """Runs of a study that have not ended, of each kind; the running one is the first that there is."""

    trials: int = 0
    verifications: int = 0
    explanations: int = 0

    @classmethod
    def of_trials(cls, trials: int, *, finals: bool) -> "RunsLeft":
        """In the search, with as many trials to come; `finals` where the best will be verified and explained."""
        return cls(trials, VERIFICATION_RUNS, EXPLANATION_RUNS) if finals else cls(trials)

    def seconds(self, elapsed: float, trial_seconds: Sequence[float], fresh_seconds: Sequence[float] = ()) -> float:
        """Seconds until all have ended.

        Args:
            elapsed: of the run that is running.
            trial_seconds: what each trial so far took.
            fresh_seconds: what each verification run so far took.
        """
        warm = statistics.fmean(trial_seconds) if trial_seconds else ASSUMED_TRIAL_SECONDS
        if not trial_seconds:
            warm = max(warm, elapsed)
        fresh = statistics.fmean(fresh_seconds) if fresh_seconds else FRESH_FACTOR * warm
        costs = [warm] * self.trials + [fresh] * self.verifications + [warm] * self.explanations
        if not costs:
            return 0.0
        # One that takes longer than the others did may still need a while, but the time left never stands still.
        half = costs[0] / 2
        running = costs[0] - elapsed if elapsed < half else half**2 / elapsed
        return running + math.fsum(costs[1:])
