"""Results that DeepSpeed's autotuner left in its folder, and which of them a later run of it may build on."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_tune.objectives.running.failures import is_out_of_memory

CLOCK_SLACK_SECONDS = 0.1
"""A file's time is the kernel's coarse clock's, which is a few milliseconds late."""


def experiments(results: Path) -> list[dict[str, Any]]:
    """Experiments that the autotuner has begun so far, in its order; `throughput` is None for what gave no figure.

    `error` is then the line for which the autotuner takes an experiment for failed, if there is one.
    """
    found = []
    for path in results.glob("*/exp.json"):
        with contextlib.suppress(ValueError):  # half written when it was stopped
            found.append((path.parent, json.loads(path.read_text())))
    rows = []
    for folder, experiment in sorted(found, key=lambda pair: pair[1]["exp_id"]):
        if experiment["name"] == "profile_model_info":
            continue
        ds_config = experiment["ds_config"]
        throughput = metric(folder / "metrics.json")
        failed = throughput is None
        rows.append(
            {
                "name": experiment["name"],
                "zero_stage": ds_config["zero_optimization"]["stage"],
                "mbs": ds_config["train_micro_batch_size_per_gpu"],
                "gas": ds_config["gradient_accumulation_steps"],
                "throughput": throughput,
                "error": error_line(folder / "stderr.log") if failed else None,
                "out_of_memory": failed and ran_out_of_memory(folder),
            }
        )
    return rows


def metric(path: Path) -> float | None:
    try:
        return float(json.loads(path.read_text())["throughput"])
    except (OSError, ValueError):
        return None


def error_line(path: Path) -> str | None:
    """The first line with the word, in the three ways that the autotuner looks for."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return next((line.strip()[:300] for line in lines if any(w in line for w in ("Error", "error", "ERROR"))), None)


def ran_out_of_memory(folder: Path) -> bool:
    """By the words of what an experiment wrote; the autotuner itself does not tell it from any other failure."""
    logs = [folder / name for name in ("stderr.log", "stdout.log")]
    return is_out_of_memory(RuntimeError("\n".join(log.read_text(errors="replace") for log in logs if log.exists())))


def winner(results: Path, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The autotuner's choice; before it has made one, the best by its metric so far; None without any figure."""
    optimal = results / "ds_config_optimal.json"
    configs = {}
    for row in rows:
        configs[row["name"]] = json.loads((results / row["name"] / "ds_config.json").read_text())
        configs[row["name"]].pop("autotuning", None)
    if optimal.exists():
        chosen = json.loads(optimal.read_text())
        name = next((name for name, config in configs.items() if config == chosen), None)
        return {"name": name, "chosen_by": "the autotuner", "ds_config": chosen}
    measured = [row for row in rows if row["throughput"] is not None]
    if not measured:
        return None
    name = max(measured, key=lambda row: float(row["throughput"]))["name"]
    return {"name": name, "chosen_by": "its metric so far", "ds_config": configs[name]}


def cut_experiment(results: Path) -> Path | None:
    """The folder of the experiment that ran when the autotuner was killed.

    Its peers' last words on their way out may hold the word for which the autotuner would count it as failed, so it has
    to go before the autotuner goes on. One that had failed just before is not told from it, and runs once more.
    """
    begun = sorted(results.glob("*/exp.json"), key=lambda path: path.stat().st_mtime)
    if not begun:
        return None
    folder = begun[-1].parent
    ended = metric(folder / "metrics.json") is not None or _is_json(folder / "model_info.json")
    return None if ended else folder


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True


def lost_seconds(results: Path, began: float, ended: float, *, resumed: bool, cut: bool) -> float:
    """Seconds of one session of the autotuner that an undisturbed run would not have taken.

    They are its start where it had been started before, and the experiment that was cut off.

    Args:
        began, ended: by the clock that files are dated with.
    """
    times = sorted(path.stat().st_mtime for path in results.glob("*/exp.json"))
    begun = [time for time in times if time >= began - CLOCK_SLACK_SECONDS]
    unfinished = cut_experiment(results) if cut else None
    if not begun:
        return ended - began if resumed or cut else 0.0
    lost = max(begun[0] - began, 0.0) if resumed else 0.0
    return lost + (ended - begun[-1] if unfinished is not None else 0.0)
