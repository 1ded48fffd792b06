"""Which of the fastest trials is really the fastest: they run again, in turns, each time in fresh processes."""

import statistics
from collections.abc import Collection

from ds_tune.objectives.timing.intervals import log_half_width
from ds_tune.storage.records import StudySummary, TrialRecord

SURE_ROUNDS = 2
"""Rounds that are always affordable. On a quiet machine they settle everything: a run in fresh processes takes about
ten seconds for GPT2-xl on H100s."""
MAX_ROUNDS = 8
BUDGET_SECONDS = 120.0
"""Further rounds begin while the verification has taken less than this, or less than the search where that took
more."""


def candidates(summary: StudySummary) -> list[TrialRecord]:
    """The trials that may be the fastest, the fastest of the search first."""
    records = {record.config.name: record for record in summary.eligible}
    return [records[name] for name in summary.candidates]


def next_runs(summary: StudySummary, failed: Collection[str] = ()) -> list[TrialRecord]:
    """Returns whom to run next, in this order; nobody when all is settled or the budget is spent.

    Everybody runs once, the baseline too. Then the fastest and those that cannot be told from it run again, the order
    turned from round to round, so that a drift of the machine favours none; and where the speed-up is not yet an
    answer, the baseline or the best, whose figure is known less.

    Args:
        failed: names of those that did not run again.
    """
    field = _undecided(summary, failed)
    rounds = min((_runs(record, summary) for record in field), default=0)
    running = [record for record in field if _runs(record, summary) == rounds and _is_affordable(rounds, summary)]
    for record in _wanted_for_speedup(summary):
        if record not in running and record.config.name not in failed:
            running.append(record)
    return running[::-1] if rounds % 2 else running


def runs_to_follow(summary: StudySummary, failed: Collection[str] = ()) -> int:
    """Returns how many runs may come after the next ones, if those settle nothing."""
    field = _undecided(summary, failed)
    rounds = min((_runs(record, summary) for record in field), default=0)
    undecided = rounds > 0 or summary.disturbance is not None
    left = len(field) * ((MAX_ROUNDS if undecided else SURE_ROUNDS) - rounds - 1)
    seconds = [run.wall_seconds for runs in summary.verification.values() for run in runs]
    sure = len(field) * (SURE_ROUNDS - rounds - 1)
    if seconds:
        affordable = (_budget_seconds(summary) - sum(seconds)) / statistics.fmean(seconds)
        left = min(left, int(affordable) - len(next_runs(summary, failed)))
    return max(left, sure, 0)


def _undecided(summary: StudySummary, failed: Collection[str]) -> list[TrialRecord]:
    """The candidates that may still turn out to be the fastest; nobody where the order is settled."""
    field = [record for record in candidates(summary) if record.config.name not in failed]
    verdict = summary.verdict_without(failed)
    if verdict is None:
        return field
    names = {verdict.leader, *verdict.level, *verdict.unsettled} if verdict.unsettled else set()
    return [record for record in field if record.config.name in names]


def _runs(record: TrialRecord, summary: StudySummary) -> int:
    return len(summary.verification.get(record.config.name, ()))


def _is_affordable(rounds: int, summary: StudySummary) -> bool:
    """Whether another round may begin after so many."""
    if rounds < SURE_ROUNDS:
        return True
    return rounds < MAX_ROUNDS and summary.verification_seconds < _budget_seconds(summary)


def _budget_seconds(summary: StudySummary) -> float:
    return max(BUDGET_SECONDS, summary.tuning_seconds)


def _wanted_for_speedup(summary: StudySummary) -> list[TrialRecord]:
    """Trials to run again for the speed-up: the baseline as often as the machine asks for, then the one of the two
    whose figure is less certain, as long as that is affordable and the speed-up is not settled."""
    best, baseline, speedup = summary.best, summary.baseline, summary.speedup
    if best is None or baseline is None:
        return []
    if _runs(baseline, summary) < (SURE_ROUNDS if summary.disturbance is not None else 1):
        return [baseline]
    if speedup is None or speedup.settled:
        return []

    def uncertainty(record: TrialRecord) -> float:
        verified = summary.verified(record)
        return log_half_width(verified.samples_per_second, verified.samples_per_second_ci95) if verified else 0.0

    known_less = max((baseline, best), key=uncertainty)
    return [known_less] if _is_affordable(_runs(known_less, summary), summary) else []
