"""Notes that optuna-dashboard shows beside a trial and beside the study, in Markdown."""

import optuna
import optuna_dashboard

from ds_tune.objectives.machine import GIB
from ds_tune.objectives.trial import Failure, Provenance
from ds_tune.storage.records import StudySummary, TrialRecord
from ds_tune.tuner.arguments import in_options
from ds_tune.tuner.reports.markdown import rate_words, summary_markdown, verified_words
from ds_tune.tuner.reports.report import Report
from ds_tune.tuner.reports.verdict import standing_words, verdict_lines

OWN_NOTE = "**{name}**"
"""How a note that ds-tune wrote begins."""


def save_trial_note(study: optuna.Study, record: TrialRecord, provenance: Provenance) -> None:
    """Notes beside a trial that has just ended what it measured, while the study goes on."""
    trial = optuna.Trial(study, study.get_trials(deepcopy=False)[record.number]._trial_id)
    optuna_dashboard.save_note(trial, in_options(trial_note(record, provenance=provenance)))


def publish(study: optuna.Study, report: Report) -> None:
    """Brings up to date what optuna-dashboard shows of a study and its trials: who won, and verified figures.

    What a person wrote in place of a trial's note is theirs.
    """
    summary = report.summary
    best = summary.best
    study.set_user_attr("best", "" if best is None else f"{best.config.name} (trial {best.number})")
    optuna_dashboard.save_note(study, in_options(study_note(report)))
    trials = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
    for record in summary.records:
        trial = optuna.Trial(study, trials[record.number]._trial_id)
        text, there = in_options(trial_note(record, summary)), optuna_dashboard.get_note(trial)
        if there != text and (not there or there.startswith(OWN_NOTE.format(name=record.config.name))):
            optuna_dashboard.save_note(trial, text)


def trial_note(
    record: TrialRecord, summary: StudySummary | None = None, provenance: Provenance = Provenance.MEASURED
) -> str:
    """The configuration, its figure, how it ended; once there is a summary, whether it is the winner.

    Args:
        provenance: of its figures, where there is no summary yet.
    """
    provenance = provenance if summary is None else summary.provenance
    lines = [OWN_NOTE.format(name=record.config.name)]
    if summary is not None and (standing := standing_words(record, summary)):
        lines[0] += f": {standing}"
        if record is summary.best:
            lines += [*verdict_lines(summary), *([words] if (words := optuna_words(summary)) is not None else [])]
    peak = record.outcome.peak_memory_bytes
    memory = "" if peak is None else f", {peak / GIB:.2f} GiB peak a rank"
    if isinstance(record.outcome, Failure):
        lines.append(f"{record.state.value}: {record.reason}")
        lines.append(f"{record.outcome.message}\n\n```\n{record.outcome.log_tail}\n```")
        return "\n\n".join(lines)
    lines.append(f"{record.state.value}: {record.reason}" if record.reason else record.state.value)
    if summary is not None and summary.verified(record) is not None:
        lines.append(
            f"{verified_words(record, summary)} samples/s verified; {rate_words(record)} in the search{memory}"
        )
    else:
        lines.append(provenance.mark(f"{rate_words(record)} samples/s{memory}"))
    return "\n\n".join(lines)


def study_note(report: Report) -> str:
    """The report, after a sentence that says which trial won."""
    summary = report.summary
    best = summary.best
    if best is None:
        return summary_markdown(report)
    kind = "the winner" if summary.winner == best.config.name else "the best so far"
    if not summary.goes_on and summary.winner is None:
        kind = "the fastest"
    told = [f"Trial {best.number}, **{best.config.name}**, is {kind}.", *verdict_lines(summary), optuna_words(summary)]
    return " ".join(words for words in told if words is not None) + "\n\n" + summary_markdown(report)


def optuna_words(summary: StudySummary) -> str | None:
    """Says so where Optuna's best trial is another than the study's; it knows the search's figures alone."""
    complete = [record for record in summary.records if record.counts and not record.reason]
    highest = max(complete, key=lambda record: record.samples_per_second or 0.0, default=None)
    if highest is None or highest is summary.best:
        return None
    return (
        f"Optuna's best trial, {highest.number} ({highest.config.name}), is the one with the highest figure in the "
        "search; it was not the best when it was checked."
    )
