"""Which of the fastest trials is really the fastest: they run again, in turns, each time in fresh processes."""

import dataclasses

from ds_tune.objectives.timing.intervals import is_answer
from ds_tune.storage.finalists import compare
from ds_tune.storage.records import Source, StudySummary, TrialRecord

CANDIDATES = 3
SURE_CANDIDATES = 2
"""The fastest of a search is the one that was also lucky: what it is really ahead of the next is seen beside it."""
CLOSE = 0.05
"""A third that is this much slower than the fastest does not catch up by the noise of one run."""

SURE_ROUNDS = 2
"""Rounds that are always affordable. On a quiet machine they settle everything: a run in fresh processes takes about
ten seconds for GPT2-xl on H100s."""
MAX_ROUNDS = 8
BUDGET_SECONDS = 120.0
"""Further rounds begin while the verification has taken less than this, or less than the search where that took
more."""

SHORT_OF_MEMORY = 0.9
"""Fraction of the memory of a rank beyond which a configuration may run out in a long training."""
FELT_MEMORY = 0.01
"""Fraction of the memory of a rank that is worth choosing a configuration for."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """State of a verification: whom to name, and what is known of the others."""

    leader: str
    """Name of the configuration to take."""
    level: tuple[str, ...]
    """Those shown to be within `storage.finalists.LEVEL` of the fastest, which may be the leader or one of these."""
    unsettled: tuple[str, ...]
    """Those that the runs so far cannot tell from the fastest."""


def candidates(summary: StudySummary) -> list[TrialRecord]:
    """The trials that may be the fastest, the fastest of the search first: two, or three that are close; more where
    something else uses the machine, and what an ablation found to be faster."""
    complete = summary.eligible
    complete.sort(key=lambda record: record.samples_per_second or 0.0, reverse=True)
    found = [record for record in complete if record.source is Source.ABLATION]
    if summary.disturbance is not None:
        chosen = [record for record in complete if record.config.name in summary.contenders]
    else:
        least = (complete[0].samples_per_second or 0.0) * (1 - CLOSE)
        close = [record for record in complete[:CANDIDATES] if (record.samples_per_second or 0.0) >= least]
        chosen = max(close, complete[:SURE_CANDIDATES], key=len)
    return [*chosen, *(record for record in found if record not in chosen)]


def judge(summary: StudySummary, failed: frozenset[str] = frozenset()) -> Verdict | None:
    """Ranks the candidates that have verification runs; None where there is none.

    The fastest is the leader, unless one that is level with it needs clearly less memory. Where the fastest is short of
    memory, those that cannot be told from it may take its place, too.

    Args:
        failed: names of those that did not run again.
    """
    busy = summary.disturbance is not None
    names = {record.config.name for record in candidates(summary)} - failed
    field = {name: finalist for name, finalist in summary.finalists.items() if name in names}
    if not field:
        return None
    fastest = next(iter(field))
    for name in field:
        if compare(field[name], field[fastest], busy=busy).log_ratio > 0:
            fastest = name
    level: list[str] = []
    unsettled: list[str] = []
    for name in field:
        comparison = compare(field[fastest], field[name], busy=busy)
        if name == fastest or comparison.is_faster:
            continue
        (level if comparison.is_level else unsettled).append(name)
    capacity = summary.machine.capacity_bytes
    peaks = {name: max(run.peak_memory_bytes for run in finalist.runs) for name, finalist in field.items()}
    contenders = list(level)
    if peaks[fastest] > SHORT_OF_MEMORY * capacity:
        contenders += [name for name in unsettled if peaks[name] <= SHORT_OF_MEMORY * capacity]
    saving = [name for name in contenders if peaks[name] < peaks[fastest] - FELT_MEMORY * capacity]
    leader = min(saving, key=peaks.__getitem__, default=fastest)
    return Verdict(
        leader=leader,
        level=tuple(name for name in (fastest, *level) if name != leader and leader not in unsettled),
        unsettled=tuple(name for name in (fastest, *level) if leader in unsettled)
        + tuple(name for name in unsettled if name != leader),
    )


def next_runs(summary: StudySummary, failed: frozenset[str] = frozenset()) -> list[TrialRecord]:
    """Returns whom to run next, in this order; nobody when all is settled or the budget is spent.

    Everybody runs once, the baseline too. Then the fastest and those that cannot be told from it run again, the order
    turned from round to round, so that a drift of the machine favours none; and the baseline where the speed-up over it
    is not yet an answer.

    Args:
        failed: names of those that did not run again.
    """
    if summary.fastest is None:
        return []
    field = [record for record in candidates(summary) if record.config.name not in failed]
    done = {record.config.name: len(summary.verification.get(record.config.name, ())) for record in field}
    rounds = min(done.values(), default=0)
    verdict = judge(summary, failed) if rounds else None
    if verdict is not None:
        contenders = {verdict.leader, *verdict.level, *verdict.unsettled} if verdict.unsettled else set()
        rounds = min((done[name] for name in contenders), default=0)
        field = [record for record in field if record.config.name in contenders and _is_affordable(rounds, summary)]
    running = [record for record in field if done[record.config.name] == rounds]
    baseline = summary.baseline
    if baseline is not None and baseline.config.name not in {*done, *failed} and _wants_baseline(baseline, summary):
        running.append(baseline)
    return running[::-1] if rounds % 2 else running


def _is_affordable(rounds: int, summary: StudySummary) -> bool:
    """Whether another round may begin after so many."""
    if rounds < SURE_ROUNDS:
        return True
    return rounds < MAX_ROUNDS and summary.verification_seconds < max(BUDGET_SECONDS, summary.tuning_seconds)


def _wants_baseline(baseline: TrialRecord, summary: StudySummary) -> bool:
    runs = len(summary.verification.get(baseline.config.name, ()))
    if runs < (SURE_ROUNDS if summary.disturbance is not None else 1):
        return True
    speedup = summary.speedup
    return speedup is not None and not is_answer(speedup.ci95) and _is_affordable(runs, summary)
