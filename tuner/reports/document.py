"""StudySummary -> the JSON document of a study; `tuner/reports/study.schema.json` describes it."""

import dataclasses
from typing import Any

from ds_tune.objectives.metric import METRICS
from ds_tune.objectives.numerics import NumericsCheck
from ds_tune.objectives.trial import Measurement
from ds_tune.storage.records import StudySummary, TrialRecord
from ds_tune.tuner.reports.metrics import metric_values, peak_flops_source
from ds_tune.tuner.reports.report import Report


def study_document(report: Report) -> dict[str, Any]:
    """One study as one JSON document, with units in the names."""
    summary = report.summary
    best, baseline, speedup, verdict = summary.best, summary.baseline, summary.speedup, summary.verdict
    return {
        "study": summary.study,
        "state": summary.state.value,
        "after_search": summary.after_search.value,
        "ended": summary.ended,
        "figures": summary.provenance.value,
        "metric": summary.metric,
        "peak_flops_source": peak_flops_source(summary),
        "model": {**summary.workload.to_json()},
        "hardware": {**summary.machine.to_json(), "description": summary.machine.description},
        "versions": dict(summary.versions),
        "seconds": summary.tuning_seconds,
        "total_seconds": summary.total_seconds,
        "trials_total": summary.trials_total,
        "trials": [_trial(record, summary) for record in summary.records],
        "best": _trial(best, summary) if best else None,
        "baseline": _trial(baseline, summary) if baseline else None,
        "tied": list(verdict.level) if verdict else [],
        "unsettled": list(verdict.unsettled) if verdict else [],
        "disturbance": summary.disturbance,
        "contributions": summary.contributions.to_json() if summary.contributions else None,
        "explanation": report.explanation,
        "numerics": [_numerics(name, found) for name, found in summary.numerics.items()],
        "not_launched": [each.to_json() for each in summary.excluded],
        "forecast_errors": dataclasses.asdict(errors) if (errors := report.forecast_errors) else None,
        "speedup": {"factor": speedup.factor, "ci95": list(speedup.ci95), "settled": speedup.settled}
        if speedup
        else None,
    }


def _numerics(name: str, found: NumericsCheck | str) -> dict[str, Any]:
    if isinstance(found, str):
        return {"name": name, "passed": None, "reason": found}
    return {
        "name": name,
        "passed": found.fault is None,
        "reason": found.fault,
        "reference": found.reference,
        "losses": list(found.curve.losses),
        "reference_losses": list(found.reference_curve.losses),
        "skipped_steps": found.curve.skipped_steps,
        "reference_skipped_steps": found.reference_curve.skipped_steps,
    }


def _trial(record: TrialRecord, summary: StudySummary) -> dict[str, Any]:
    measured = record.outcome if isinstance(record.outcome, Measurement) else None
    verified = summary.verified(record)
    return {
        "number": record.number,
        "name": record.config.name,
        "state": record.state.value,
        "config": record.config.to_json(),
        "global_batch_size": record.config.global_batch_size(record.machine.ranks),
        "samples_per_second": measured.samples_per_second if measured else None,
        "samples_per_second_ci95": list(measured.samples_per_second_ci95) if measured else None,
        "metrics": metric_values(measured, summary) if measured else dict.fromkeys(METRICS),
        "verified_samples_per_second": verified.samples_per_second if verified else None,
        "verified_samples_per_second_ci95": list(verified.samples_per_second_ci95) if verified else None,
        "verification_runs": verified.runs if verified else 0,
        "deepspeed_samples_per_second": measured.deepspeed_samples_per_second if measured else None,
        "peak_memory_bytes": record.outcome.peak_memory_bytes,
        "seconds": record.outcome.wall_seconds,
        "started_at": record.started_at,
        "reason": record.reason,
        "source": record.source.value,
        "forecast": record.forecast.to_json() if record.forecast else None,
    }
