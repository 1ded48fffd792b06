"""Marks and sentences: who won a study and by how much, who could not be told from it, what is still to be done."""

from ds_tune.objectives.trial import Provenance
from ds_tune.storage.finalists import LEVEL
from ds_tune.storage.records import AfterSearch, Source, StudySummary, TrialRecord, TrialState
from ds_tune.storage.verdict import Verdict

WINNER, LEADS, FASTEST = "★ winner", "★ best so far", "★ fastest of the search"
IS_LEVEL, UNSETTLED = "level with the winner", "not told from the winner"
LEAST_BOUND = 1.1
"""A speed-up that is known to be at least this is worth saying."""
SYMBOLS = {WINNER: "★", LEADS: "★", FASTEST: "★", IS_LEVEL: "=", UNSETTLED: "?"}


def standing_words(record: TrialRecord, summary: StudySummary) -> str:
    """Whether a configuration won or leads so far, is level with the first or not told from it, or neither: then
    nothing."""
    verdict = summary.verdict
    if record.state is not TrialState.COMPLETE:
        return ""
    if summary.best is not None and record.config.name == summary.best.config.name:
        return first_words(summary)
    if verdict is not None and record.config.name in verdict.unsettled:
        return UNSETTLED
    return IS_LEVEL if verdict is not None and record.config.name in verdict.level else ""


def first_words(summary: StudySummary) -> str:
    """Title of the best configuration: only what was measured has to be verified to win."""
    if summary.winner is not None or (summary.is_searched and summary.provenance is not Provenance.MEASURED):
        return WINNER
    return LEADS if summary.verification or not summary.is_searched else FASTEST


def legend_words(summary: StudySummary) -> str:
    """Explains the marks in the tables, of those that are there."""
    verdict, first = summary.verdict, first_words(summary)
    if not summary.verification:
        return f"{first}; all figures are {summary.provenance.value}."
    level = ", = level with it" if verdict is not None and verdict.level else ""
    unsettled = ", ? not told from it" if verdict is not None and verdict.unsettled else ""
    return f"{first}{level}{unsettled}, ✓ verified in fresh processes; other figures are of the search."


def after_search_words(summary: StudySummary, *, goes_on: bool = False) -> str | None:
    """Says what is still to be done after the search; None where nothing is.

    Args:
        goes_on: this command does it.
    """
    if summary.after_search in (AfterSearch.NONE, AfterSearch.DONE):
        return None
    what = "verification" if summary.after_search is AfterSearch.VERIFICATION else "measuring what each setting brings"
    return f"{what} goes on" if goes_on else f"{what} is incomplete: the same command goes on with it"


def improvement_words(summary: StudySummary) -> str:
    """The best trial's speed-up over the baseline with its interval, in one phrase."""
    speedup = summary.speedup
    if summary.best is None:
        return "none: no configuration ran"
    if speedup is None:
        return "Inf (the baseline does not run)"
    if summary.best is summary.baseline:
        return summary.provenance.mark("1.00× (nothing tried was faster than the baseline)")
    low, high = speedup.ci95
    words = f"{speedup.factor:.2f}×"
    if not speedup.settled:
        words = f"at least {low:.2f} times" if low >= LEAST_BOUND else "too noisy to tell"
    verified = [summary.verified(record) for record in (summary.best, summary.baseline) if record is not None]
    search = " in the search" if summary.verification and None in verified else ""
    return summary.provenance.mark(f"{words}{search} (95% interval {low:.2f}–{high:.2f})")


def untuned_words(summary: StudySummary) -> str | None:
    """The best trial's rate over that of untuned training, in the search, in one phrase.

    None where that did not run beside a person's own configuration, which is the baseline.
    """
    best, baseline = summary.best, summary.baseline
    complete = [record for record in summary.records if record.state is TrialState.COMPLETE]
    others = [record for record in complete if record.source is Source.BASELINE and record is not baseline]
    untuned = others[0] if others else None
    if best is None or untuned is None or not best.samples_per_second or not untuned.samples_per_second:
        return None
    factor = best.samples_per_second / untuned.samples_per_second
    return summary.provenance.mark(f"{factor:.2f}× in the search ({untuned.config.name})")


def verdict_lines(summary: StudySummary) -> list[str]:
    """Lines on the others after the verification: who is level with the winner, and who could not be told from it."""
    verdict, disturbance = summary.verdict, summary.disturbance
    lines = [] if verdict is None else _ranking_lines(verdict, summary)
    if disturbance is not None and summary.verification:
        lines.append(
            f"Something else used the machine: steps of one configuration differ by {disturbance:.0%}. Verified "
            "figures are of the least disturbed steps of each configuration, and these were compared."
        )
    if (words := after_search_words(summary)) is not None:
        lines.append(f"{words[0].upper()}{words[1:]}.")
    return lines


def _ranking_lines(verdict: Verdict, summary: StudySummary) -> list[str]:
    records = {record.config.name: record for record in summary.eligible}
    if verdict.leader not in records:
        return []
    lines = []
    leader, fastest = records[verdict.leader], summary.fastest
    if verdict.level:
        peaks = [records[name].outcome.peak_memory_bytes or 0 for name in verdict.level if name in records]
        saves = (leader.outcome.peak_memory_bytes or 0) < min(peaks, default=0)
        least = "; it needs the least memory" if saves else ""
        lines.append(f"Level with {', '.join(verdict.level)}: within {LEVEL:.0%}{least}.")
    named = (verdict.leader, *verdict.level, *verdict.unsettled)
    if summary.winner is not None and fastest is not None and fastest.config.name not in named:
        how = "was slower when verified" if summary.verified(fastest) is not None else "did not run again when verified"
        lines.append(f"{fastest.config.name}, the fastest of the search, {how}.")
    if verdict.unsettled:
        highest = all(summary.rate(records[name]) <= summary.rate(leader) for name in verdict.unsettled)
        why = "its figure is the highest" if highest else "it needs less memory"
        decided = summary.winner is not None and summary.disturbance is not None
        again = " Run again when nothing else uses the machine." if decided else ""
        lines.append(f"{verdict.leader} is not told from {', '.join(verdict.unsettled)}; {why}.{again}")
    return lines
