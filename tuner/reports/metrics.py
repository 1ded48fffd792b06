"""Metrics of a study's trials: samples/s said in other units."""

from collections.abc import Sequence

from ds_tune.objectives.metric import DEFAULT_METRIC, METRICS, all_metrics, metric_context
from ds_tune.objectives.trial import Measurement
from ds_tune.storage.records import StudySummary, TrialRecord


def metric_values(
    measurement: Measurement, summary: StudySummary, *, samples_per_second: float | None = None
) -> dict[str, float | None]:
    """Value of every metric by its name; None where what it needs is not known.

    Args:
        samples_per_second: a verified rate of the same configuration, in place of the measurement's.
    """
    context = metric_context(summary.workload, summary.machine, measurement.flops_per_sample)
    rate = measurement.samples_per_second if samples_per_second is None else samples_per_second
    return all_metrics(rate, context)


def metric_rows(records: Sequence[TrialRecord | None], summary: StudySummary) -> list[list[str]]:
    """A row a metric other than samples/s: its unit, then its value for each record, verified where all of them are."""
    verified = all(record is None or summary.verified(record) is not None for record in records)
    values = [
        metric_values(record.outcome, summary, samples_per_second=summary.rate(record) if verified else None)
        if record is not None and isinstance(record.outcome, Measurement)
        else dict.fromkeys(METRICS)
        for record in records
    ]
    return [
        [
            summary.provenance.mark(metric.unit_on(summary.machine.device)),
            *(metric.words(of_record[name]) for of_record in values),
        ]
        for name, metric in METRICS.items()
        if name != DEFAULT_METRIC
    ]


def peak_flops_source(summary: StudySummary) -> str | None:
    """The GPU's peak that MFU is a share of, with its origin; None where it is not known."""
    # Any FLOPs will do: the peak does not depend on them, and a hub need not be asked.
    return metric_context(summary.workload, summary.machine, flops_per_sample=1.0).peak_source or None


def metric_line(summary: StudySummary) -> str:
    """Which peak MFU is a share of, and what was maximised where that is not samples/s."""
    source = peak_flops_source(summary)
    line = f"MFU is a share of {source}." if source else "MFU is not known: this device's peak is not in the catalogue."
    if summary.metric != DEFAULT_METRIC:
        line += f" The study maximises {METRICS[summary.metric].unit_on(summary.machine.device)}."
    return line
