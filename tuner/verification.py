"""Which of the fastest trials is really the fastest: they run again, interleaved, each time in fresh processes."""

import dataclasses
from collections.abc import Mapping, Sequence

from objectives.trial import Measurement
from storage.records import StudySummary, TrialRecord
from storage.verification import VerifiedRate, verified_rate

CANDIDATES = 3
SURE_CANDIDATES = 2
"""The fastest of a search is the one that was also lucky: what it is really ahead of the next is seen beside it."""
CLOSE = 0.05
"""A third that is this much slower than the fastest does not catch up by the noise of one run."""

MAX_ROUNDS = 2
"""A run in fresh processes takes about ten seconds for GPT2-xl on H100s. What two rounds leave open is a percent or
less, and then free memory is the better reason."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How a verification stands."""

    leader: str
    """The name of the fastest so far; among those tied with it, the one that leaves the most memory free."""
    tied: tuple[str, ...]
    """Those that the leader is not settled to be faster than."""


def candidates(summary: StudySummary) -> list[TrialRecord]:
    """The trials that may be the fastest: two, or three that are close, the fastest of the search first."""
    complete = summary.eligible
    complete.sort(key=lambda record: record.samples_per_second or 0.0, reverse=True)
    fastest = complete[0].samples_per_second or 0.0
    close = [record for record in complete[:CANDIDATES] if (record.samples_per_second or 0.0) >= fastest * (1 - CLOSE)]
    return max(close, complete[:SURE_CANDIDATES], key=len)


def verified_rates(
    records: Sequence[TrialRecord], runs: Mapping[str, Sequence[Measurement]]
) -> dict[str, VerifiedRate]:
    """The rates of those trials that have verification runs, by name."""
    return {
        record.config.name: verified_rate(runs[record.config.name], record.outcome)
        for record in records
        if runs.get(record.config.name) and isinstance(record.outcome, Measurement)
    }


def judge(rates: Mapping[str, VerifiedRate]) -> Verdict:
    """Ranks the verified candidates; there is at least one."""
    fastest = max(rates, key=lambda name: rates[name].log_rate)
    level = [name for name, rate in rates.items() if not rates[fastest].is_faster_than(rate)]
    leader = min(level, key=lambda name: rates[name].peak_memory_bytes)
    return Verdict(leader=leader, tied=tuple(name for name in level if name != leader))


def next_runs(
    summary: StudySummary, runs: Mapping[str, Sequence[Measurement]], failed: frozenset[str] = frozenset()
) -> list[TrialRecord]:
    """Whom to run next, in this order; nobody when the order is settled or has had its rounds.

    Everybody runs once, the baseline too. Then those that are level with the fastest, as long as there are two of them:
    the order turns from round to round, so that a drift of the machine favours none.
    """
    if summary.fastest is None:
        return []
    field = [record for record in candidates(summary) if record.config.name not in failed]
    done = {record.config.name: len(runs.get(record.config.name, ())) for record in field}
    rounds = min(done.values(), default=0)
    running = [record for record in field if done[record.config.name] == rounds]
    if rounds > 0:
        verdict = judge(verified_rates(field, runs))
        level = {verdict.leader, *verdict.tied}
        running = [record for record in field if record.config.name in level and done[record.config.name] < MAX_ROUNDS]
        fewest = min((done[record.config.name] for record in running), default=0)
        running = [record for record in running if done[record.config.name] == fewest]
        if not verdict.tied:
            running = []
        rounds = fewest
    baseline = summary.baseline
    if baseline is not None and baseline.config.name not in {*done, *failed} and not runs.get(baseline.config.name):
        running.append(baseline)
    return running[::-1] if rounds % 2 else running
