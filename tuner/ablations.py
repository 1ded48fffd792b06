"""The winner less each of its settings, and how such a configuration did beside it."""

import dataclasses
import math
from collections.abc import Callable

from ds_tune.objectives.timing.intervals import log_half_width
from ds_tune.objectives.trial import CORE_FIELDS, KNOBS, Measurement, Outcome, TrialConfig
from ds_tune.storage.ablations import Ablation
from ds_tune.storage.finalists import RUN_NOISE, log_rate, ratio_noise, undisturbed_log_rate
from ds_tune.storage.records import StudySummary, TrialRecord


def ablated(
    winner: TrialConfig, summary: StudySummary, is_legal: Callable[[TrialConfig], bool]
) -> list[tuple[str, TrialConfig]]:
    """The winner less each of its settings: a knob off, or stage or batch sizes as the baseline has them.

    What the study could not have proposed is left out, such as another batch size where the global batch is fixed.
    """
    changes: list[tuple[str, int | str]] = [(field, KNOBS[field].off) for field in winner.knobs_on]
    if summary.baseline is not None:
        kept = [field for field in summary.baseline.config.knobs_on if field not in winner.knobs_on]
        for field in (*CORE_FIELDS, *kept):
            value = getattr(summary.baseline.config, field)
            if value != getattr(winner, field):
                changes.append((field, value))
    configs = [(field, TrialConfig.from_json({**winner.to_json(), field: value})) for field, value in changes]
    return [(field, config) for field, config in configs if is_legal(config)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AgainstWinner:
    """Results of a configuration and of the winner beside it: figures of one kind."""

    outcome: Outcome
    samples_per_second: float | None
    """None where it did not run."""
    winner_samples_per_second: float
    noise: float
    """Half the 95% interval of the logarithm of their ratio."""

    @property
    def is_faster(self) -> bool:
        """Whether it beat the winner by more than two runs of one configuration differ by.

        Where something else uses the machine that is less than the noise: to be disturbed makes none faster.
        """
        if self.samples_per_second is None or not isinstance(self.outcome, Measurement) or self.outcome.stopped_early:
            return False
        return math.log(self.samples_per_second / self.winner_samples_per_second) > 2 * RUN_NOISE

    def ablation(self, field: str, config: TrialConfig) -> Ablation:
        """The record of it as the winner less one setting."""
        return Ablation.of(
            field,
            config,
            self.outcome,
            samples_per_second=self.samples_per_second,
            winner_samples_per_second=self.winner_samples_per_second,
            noise=self.noise,
        )


def beside(record: TrialRecord, winner: TrialRecord, summary: StudySummary) -> AgainstWinner:
    """A trial of the study beside the winner: both as verified where both were, else both of the search."""
    theirs, ours = summary.verified(record), summary.verified(winner)
    if theirs is not None and ours is not None:
        return AgainstWinner(
            outcome=record.outcome,
            samples_per_second=theirs.samples_per_second,
            winner_samples_per_second=ours.samples_per_second,
            noise=math.hypot(
                *(log_half_width(each.samples_per_second, each.samples_per_second_ci95) for each in (theirs, ours))
            ),
        )
    return in_one_session(record.outcome, winner.outcome, winner, summary, search=True)


def in_one_session(
    outcome: Outcome, again: Outcome | None, winner: TrialRecord, summary: StudySummary, *, search: bool = False
) -> AgainstWinner:
    """A run beside a run of the winner in the same processes.

    Where something else uses the machine both count by the fastest quarter of their steps, and the winner by its best
    run, unless both are of the `search`.
    """
    disturbed = summary.disturbance is not None
    rate = undisturbed_log_rate if disturbed else log_rate
    verified = summary.verified(winner)
    ours = [rate(again)] if isinstance(again, Measurement) else []
    if not search and verified is not None and (disturbed or not ours):
        ours.append(math.log(verified.samples_per_second))
    return AgainstWinner(
        outcome=outcome,
        samples_per_second=math.exp(rate(outcome)) if isinstance(outcome, Measurement) else None,
        winner_samples_per_second=math.exp(max(ours)) if ours else winner.samples_per_second or 0.0,
        noise=ratio_noise(summary.run_noise or 0.0),
    )
