"""StudySummary -> summary.md, in the form of the tables that DeepSpeed publishes for its autotuner."""

import datetime

import tabulate

from ds_tune.objectives.machine import GIB
from ds_tune.objectives.metric import METRICS
from ds_tune.objectives.numerics import NumericsCheck
from ds_tune.objectives.timing.intervals import is_answer
from ds_tune.objectives.trial import KNOBS, Measurement, Provenance
from ds_tune.objectives.words import counted
from ds_tune.storage.records import Source, StudySummary, TrialRecord
from ds_tune.tuner.reports.metrics import metric_line, metric_rows, metric_values
from ds_tune.tuner.reports.model import model_words
from ds_tune.tuner.reports.report import Report
from ds_tune.tuner.reports.verdict import improvement_words, standing_words, untuned_words, verdict_lines

ORIGINS = {
    Provenance.SIMULATED: "All figures are **simulated**: a cost model gave them, with noise; nothing was run.",
    Provenance.REPLAYED: "All figures are **replayed**: a recording of earlier runs gave them; nothing was run.",
}


def summary_markdown(report: Report) -> str:
    """The whole report: results, every trial, versions, hardware, and how it was measured."""
    summary = report.summary
    sections = [
        f"# {summary.provenance.mark(summary.workload.title)}\n",
        *(f"{ORIGINS[provenance]}\n" for provenance in ORIGINS if provenance is summary.provenance),
        _environment(summary),
        "## Throughput\n",
        throughput_table(summary),
        *([metric_table(summary)] if summary.best is not None else []),
        *_counting(summary),
        "\n## Detailed result summary\n",
        _bullets(summary),
        stage_table(report, marked=True),
        *(f"\n{line}" for line in verdict_lines(summary)),
        f"\n{closing_line(summary)}",
        "\n## Trials\n",
        trial_table(summary),
        *_explanation(report),
        *_numerics(summary),
        *_cost_model(report),
        "\n## How this was measured\n",
        _method(summary),
    ]
    return "\n".join(sections) + "\n"


def duration_words(seconds: float) -> str:
    """Such as `41 s`, `3 min 20 s` or `1 h 2 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def tuning_words(summary: StudySummary) -> str:
    """How long the search took, and where its trials were not run, what they would have taken."""
    words = duration_words(summary.tuning_seconds)
    if summary.provenance is Provenance.MEASURED:
        return words
    return f"{words} (the trials' own time: {summary.provenance.mark(duration_words(summary.trial_seconds))})"


def total_words(summary: StudySummary) -> str:
    """How long the whole study took, and with what."""
    words = f"Tuning took {tuning_words(summary)}, {trials_words(summary)}"
    if not summary.verification:
        return f"{words}."
    words += f"; verification {duration_words(summary.verification_seconds)}"
    if (explanation := (summary.finals_seconds or 0.0) - summary.verification_seconds) >= 1:
        words += f"; comparing losses and ablations {duration_words(explanation)}"
    return f"{words}; {duration_words(summary.total_seconds)} in all."


def trials_words(summary: StudySummary) -> str:
    """How many trials there are, and how many of them were not asked for, for they came after the search."""
    count = len(summary.records)
    later = sum(record.source is Source.ABLATION for record in summary.records)
    words = counted(count, "trial")
    return f"{words}, {later} of them after the search" if later else words


def rate_words(record: TrialRecord) -> str:
    """Samples per second with the half width of its 95% interval; a dash for a trial without one."""
    if not isinstance(record.outcome, Measurement):
        return "–"
    return _with_half_width(record.outcome.samples_per_second, record.outcome.samples_per_second_ci95)


def verified_words(record: TrialRecord, summary: StudySummary, *, short: bool = False) -> str:
    """Samples per second of its runs in fresh processes, with the half width, and with their number unless short."""
    verified = summary.verified(record)
    if verified is None:
        return "–"
    runs = counted(verified.runs, "run")
    words = _with_half_width(verified.samples_per_second, verified.samples_per_second_ci95)
    return words if short else f"{words} ({runs})"


def _with_half_width(rate: float, ci95: tuple[float, float]) -> str:
    low, high = ci95
    return f"{rate:.2f} ± {(high - low) / 2:.2f}" if is_answer(ci95) else f"about {rate:.3g}"


def figure_words(record: TrialRecord, summary: StudySummary) -> str:
    """The one figure of a configuration that tables show: the verified one, with a tick, where there is one."""
    return (
        rate_words(record) if summary.verified(record) is None else f"{verified_words(record, summary, short=True)} ✓"
    )


def numerics_words(name: str, found: NumericsCheck | str) -> str:
    """Result of comparing a configuration's losses with untuned training, in one sentence."""
    if isinstance(found, str):
        return f"Numbers of {name}: {found}."
    if found.fault is not None:
        return f"{name} is not the winner, for it trains something else: {found.fault}."
    return (
        f"{name} trains as untuned training does: over {len(found.curve.losses)} steps from the same seed and data, "
        f"its losses match those of {found.reference} (largest deviation {max(found.learned_error, 1e-6):.0e} of the "
        "loss change)."
    )


def throughput_table(summary: StudySummary) -> str:
    """The seed's comparison table: the baseline beside the best, with what each trains on a step."""
    # Only what was measured is verified; the column would be a claim.
    measured = summary.provenance is Provenance.MEASURED
    rows = []
    for title, record in (("baseline", summary.baseline), ("ds-tune", summary.best)):
        if record is None:
            rows.append([title, "not runnable"])
            continue
        rows.append(
            [
                title,
                record.config.name,
                rate_words(record),
                *([verified_words(record, summary)] if measured else []),
                str(record.config.global_batch_size(record.machine.ranks)),
                _gib(record),
            ]
        )
    rates = ["samples/s in the search", "verified"] if measured else [summary.provenance.mark("samples/s")]
    headers = ["", "configuration", *rates, "global batch", summary.provenance.mark("peak GiB a rank")]
    return tabulate.tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


def metric_table(summary: StudySummary) -> str:
    """The baseline's and the best's throughput in other units, and the peak that MFU is a share of."""
    rows = metric_rows([summary.baseline, summary.best], summary)
    table = tabulate.tabulate(rows, headers=["", "baseline", "ds-tune"], tablefmt="pipe", disable_numparse=True)
    return f"\n{table}\n\n{metric_line(summary)}"


def _counting(summary: StudySummary) -> list[str]:
    """What is counted where samples differ in length, and how much of it the best trains."""
    counting, best = summary.workload.counting, summary.best
    if not counting or best is None or not isinstance(best.outcome, Measurement):
        return []
    tokens = metric_values(best.outcome, summary, samples_per_second=summary.rate(best))["tokens_per_second"]
    return [f"\nThe best trains {METRICS['tokens_per_second'].words(tokens)} tokens/s: {counting}."]


def stage_table(report: Report, *, marked: bool = False) -> str:
    """DeepSpeed's table of tuning spaces: for each ZeRO stage its trials and its best, then over all of them.

    Args:
        marked: name the winner and what is level with it, which DeepSpeed's table has no room for.
    """
    summary = report.summary

    def name(best: TrialRecord | None) -> str | None:
        if best is None:
            return None
        standing = standing_words(best, summary) if marked else ""
        return f"{best.config.name} ({standing})" if standing else best.config.name

    return tabulate.tabulate(
        [[space, count, best and summary.rate(best), name(best)] for space, count, best in report.stages],
        headers=["tuning_space", "num_experiments", "best_metric_val", "best_exp_name"],
        tablefmt="pipe",
    )


def closing_line(summary: StudySummary) -> str:
    """The sentence that DeepSpeed's autotuner ends its summary with."""
    duration = datetime.timedelta(seconds=summary.tuning_seconds)
    origin = "" if summary.provenance is Provenance.MEASURED else f" All figures are {summary.provenance.value}."
    return f"Tuning completed in {duration}. Total number of experiments: {len(summary.records)}.{origin}"


def trial_table(summary: StudySummary) -> str:
    """Every trial with its configuration and how it ended."""
    shown = [field for field in KNOBS if any(field in record.config.knobs_on for record in summary.records)]
    rows = [
        [
            record.number,
            record.config.name,
            record.config.zero_stage,
            record.config.micro_batch_size,
            record.config.gradient_accumulation_steps,
            *(getattr(record.config, field) for field in shown),
            record.config.global_batch_size(record.machine.ranks),
            rate_words(record),
            _gib(record),
            record.state.value,
            # A pipe in a message would end the cell.
            (record.reason or standing_words(record, summary) or record.source.value).replace("|", "/"),
        ]
        for record in summary.records
    ]
    rate, peak = summary.provenance.mark("samples/s"), summary.provenance.mark("peak GiB")
    knobs = ["stage", "mbs", "gas", *(KNOBS[field].short for field in shown)]
    headers = ["#", "name", *knobs, "global batch", rate, peak, "state", "note"]
    return tabulate.tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


def _explanation(report: Report) -> list[str]:
    """Why the best is as fast as it is, and what would make it faster."""
    lines = report.explanation
    return ["\n## Why\n\n" + "\n".join(f"- {line}" for line in lines)] if lines else []


def _numerics(summary: StudySummary) -> list[str]:
    """Whether the finalists train what the baseline trains."""
    if not summary.numerics:
        return []
    lines = [f"- {numerics_words(name, found)}" for name, found in summary.numerics.items()]
    for found in summary.numerics.values():
        if isinstance(found, NumericsCheck) and (skipped := found.curve.skipped_steps):
            lines.append(
                f"- fp16 overflow skipped {skipped} of its steps and {found.reference_curve.skipped_steps} of "
                f"{found.reference}'s; they were repeated."
            )
    return ["\n## Numerics\n\n" + "\n".join(lines)]


def _cost_model(report: Report) -> list[str]:
    """How wrong the cost model was, and what it kept from being launched."""
    sections = []
    summary, errors = report.summary, report.forecast_errors
    if errors is not None:
        learned = ", ".join(f"{error:+.0%}" for error in errors.last_rates)
        sections.append(
            "\n## Cost model\n\n"
            "Each trial was predicted just before it ran, from data sheets, formulas and the trials before it. Over "
            f"{counted(errors.trials, 'trial')} the predicted samples/s were off by {errors.rate_median:.1%} in the "
            f"median and {errors.rate_worst:.1%} at most, the predicted peak memory by {errors.memory_median:.1%} and "
            f"{errors.memory_worst:.1%}. Samples/s, trial by trial: {learned}."
        )
    if summary.excluded:
        capacity = summary.machine.capacity_bytes / GIB
        rows = [
            [each.name, f"{each.predicted_peak_memory_bytes / GIB:.2f}", each.configurations]
            for each in summary.excluded
        ]
        headers = ["smallest micro-batch", "peak GiB, predicted", "configurations"]
        sections.append(
            f"\n## Not launched\n\nThese certainly need more than the {capacity:.2f} GiB of a rank:\n\n"
            + tabulate.tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)
        )
    return sections


def _gib(record: TrialRecord) -> str:
    peak = record.outcome.peak_memory_bytes
    return "–" if peak is None else f"{peak / GIB:.2f}"


def _environment(summary: StudySummary) -> str:
    data = f"- data: {summary.workload.data_words}\n" if summary.workload.data_words else ""
    model = "" if (words := model_words(summary)) is None else f"- model: {words}\n"
    versions = "\n".join(f"- {name} ({version})" for name, version in summary.versions.items())
    return (
        "## Environment\n\n"
        f"- training: {summary.workload.description}\n"
        f"{data}"
        f"{model}"
        f"- hardware: {summary.machine.description}\n"
        f"{versions}\n"
    )


def _bullets(summary: StudySummary) -> str:
    lines = [
        f"- Tuning time: {tuning_words(summary)}",
        *([f"- With what came after it: {duration_words(summary.total_seconds)}"] if summary.verification else []),
        f"- Number of experiments: {len(summary.records)}",
        f"- Throughput improvement over baseline: {improvement_words(summary)}",
    ]
    if (words := untuned_words(summary)) is not None:
        lines.append(f"- Throughput improvement over untuned training: {words}")
    if summary.verification:
        lines.append(f"- Verification, in fresh processes: {duration_words(summary.verification_seconds)}")
    if summary.state.value == "unfinished":
        lines.append(f"- Not finished: {summary.finished_trials} of {summary.trials_total} trials")
    elif summary.ended:
        lines.append(f"- Ended early: {summary.ended}")
    return "\n".join(lines) + "\n"


def _method(summary: StudySummary) -> str:
    text = (
        "Throughput is end to end: ranks × mbs × gas over the mean seconds of one whole optimizer step on the slowest "
        "rank, data loading included, after warm-up steps. The ± is half the 95% confidence interval of that mean "
        "(Student's t over the steps of one run; differences between runs come on top). Steps that fp16 overflow "
        "skipped are left out. Memory is the most that any rank had allocated."
    )
    if summary.workload.counting:
        text += (
            " Samples differ in length: each step counts for the tokens, padding apart, that it was fed on all ranks, "
            "and a sample is as many of them as the samples seen first had in the mean."
        )
    if summary.provenance is not Provenance.MEASURED:
        return f"{ORIGINS[summary.provenance]} What they stand for: {text[0].lower()}{text[1:]}"
    text += f" {_verified_method(summary)}"
    best = summary.best
    if best is not None and isinstance(best.outcome, Measurement):
        measured = best.outcome
        samples = best.config.global_batch_size(best.machine.ranks)
        timers = samples / (measured.forward_seconds + measured.backward_seconds + measured.optimizer_seconds)
        text += (
            f"\n\nFor comparison with DeepSpeed's own figures, {best.config.name} over the sum of its forward, "
            f"backward and step timers, as DeepSpeed's autotuner counts: {timers:.2f} samples/s"
        )
        if measured.deepspeed_samples_per_second is not None:
            text += f"; by DeepSpeed's ThroughputTimer: {measured.deepspeed_samples_per_second:.2f} samples/s"
        text += "."
    return text


def _verified_method(summary: StudySummary) -> str:
    """How the verified figures came about, which on a busy machine is another way."""
    if summary.disturbance is None:
        return (
            "Verified figures are means over runs in fresh processes, interleaved with the other finalists'; their "
            "interval also allows for what two runs of one configuration differ by."
        )
    return (
        "As something else used the machine, verified figures are those of the fastest quarter of the steps of the "
        "best run of each configuration, its trial included; runs in fresh processes were interleaved. Their interval "
        "allows for what the runs of one configuration differ by."
    )
