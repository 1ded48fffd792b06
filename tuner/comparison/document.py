"""A comparison as one JSON document, and as CSV: `comparison.schema.json` says what each key is."""

import csv
import io
from typing import Any

from ds_tune.objectives.machine import software_versions
from ds_tune.objectives.metric import METRICS, metric_context
from ds_tune.storage.finalists import Speedup
from ds_tune.tuner.comparison.figures import Figures, RowFigures


def comparison_document(figures: Figures) -> dict[str, Any]:
    """The JSON document."""
    first = figures.models[0]
    return {
        "complete": figures.is_complete,
        "hardware": first.machine.to_json(),
        "versions": software_versions(),
        "peak_flops_source": metric_context(first.workload, first.machine, flops_per_sample=1.0).peak_source or None,
        "rounds": figures.request.rounds,
        "models": [
            {"model": each.model, "training": each.workload.to_json(), "one_global_batch": each.one_batch}
            for each in figures.models
        ],
        "rows": [row_document(row) for row in figures.rows],
    }


def row_document(row: RowFigures) -> dict[str, Any]:
    """One row of one table of one model."""
    return {
        "model": row.model,
        "batch": row.batch.value,
        "row": row.row.value,
        "runnable": row.is_runnable,
        "reason": row.reason,
        "name": row.config.name if row.config else None,
        "config": row.config.to_json() if row.config else None,
        "trainer": row.row.trainer,
        "global_batch_size": row.global_batch,
        "samples_per_second": row.rate.samples_per_second if row.rate else None,
        "samples_per_second_ci95": list(row.rate.samples_per_second_ci95) if row.rate else None,
        "runs": row.rate.runs if row.rate else 0,
        "metrics": {name: row.metrics.get(name) for name in METRICS},
        "peak_memory_bytes": row.peak_memory_bytes,
        "tuning_seconds": row.search.seconds,
        "total_seconds": row.search.total_seconds,
        "experiments": row.search.experiments,
        "out_of_memory": row.search.out_of_memory,
        "over_vanilla": _speedup(row.over_vanilla),
        "over_hand_tuned": _speedup(row.over_hand_tuned),
        "disturbance": row.disturbance,
    }


def _speedup(speedup: Speedup | None) -> dict[str, Any] | None:
    if speedup is None:
        return None
    return {"factor": speedup.factor, "ci95": list(speedup.ci95), "settled": speedup.settled}


def comparison_csv(figures: Figures) -> str:
    """A line a row, in bytes and seconds."""
    text = io.StringIO()
    lines = [_flat(row_document(row)) for row in figures.rows]
    writer = csv.DictWriter(text, list(lines[0]) if lines else [], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _flat(document: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        match key:
            case "config":
                core = ("zero_stage", "micro_batch_size", "gradient_accumulation_steps")
                flat |= {field: (value or {}).get(field) for field in core}
            case "metrics":
                flat |= {name: each for name, each in value.items() if name not in flat}
            case "samples_per_second_ci95":
                flat |= _ends(key, value)
            case "over_vanilla" | "over_hand_tuned":
                flat[key] = value and value["factor"]
                flat |= _ends(f"{key}_ci95", value and value["ci95"])
            case _:
                flat[key] = value
    return flat


def _ends(key: str, ci95: list[float] | None) -> dict[str, float | None]:
    low, high = ci95 or (None, None)
    return {f"{key}_low": low, f"{key}_high": high}
