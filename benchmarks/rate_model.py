"""Errors of predicted rates on recorded machines, by what decides; and the fit of the constants of compute.

    python benchmarks/rate_model.py [--fit | --intervals [--seeds 50]]

Each cell: how many configurations, the median and the largest relative error of the formulas alone. What decides is
what takes most of the predicted step. The fit is by least squares (robust, of logarithms) to the trials of studies on
GPUs (`benchmarks/data/studies`) in which compute decides, from micro-batches of 3 on, without ZeRO-3 and offloading.
The surfaces give it nothing. `--intervals` prints how many rates that nine random trials left open lie inside their 95%
interval.
"""

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tabulate
from scipy.optimize import least_squares

from ds_tune.objectives.cost_model.calibration import calibrate_rates, observation_of
from ds_tune.objectives.cost_model.hardware import hardware_of
from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.cost_model.step_inputs import StepConstants
from ds_tune.objectives.machine import Machine
from ds_tune.objectives.recorded.recording import read_recording
from ds_tune.objectives.trial import Measurement, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

DATA = Path(__file__).parent / "data"
FITTED = ("efficiency", "traffic", "compiled_traffic", "gap_seconds")
SMALLEST_MICRO_BATCH = 3
LEVEL = 0.03
"""Beyond this relative error a trial counts less than by its square: its host may have been slow."""

Rate = tuple[CostModel, TrialConfig, float]
"""A model, a configuration, and its measured samples/s."""


def of_surface(path: Path) -> list[Rate]:
    """The configurations of a surface that ran."""
    surface = read_recording(path)
    model = CostModel(surface.workload, hardware_of(surface.machine))
    return [
        (model, config, outcome.samples_per_second)
        for config, outcome in surface.outcomes.items()
        if isinstance(outcome, Measurement)
    ]


def of_study(path: Path) -> list[Rate]:
    """The trials of a study that ran."""
    study = json.loads(path.read_text())
    machine = Machine.from_json({key: value for key, value in study["hardware"].items() if key != "description"})
    model = CostModel(
        HuggingFaceWorkload(**{key: study["model"][key] for key in ("model", "seq_len", "dtype")}), hardware_of(machine)
    )
    return [
        (model, TrialConfig.from_json(trial["config"]), trial["samples_per_second"])
        for trial in study["trials"]
        if trial["state"] == "complete"
    ]


def fitted(studies: Iterable[Path]) -> StepConstants:
    """The constants under which what these studies measured is likeliest."""
    default = StepConstants()
    rates = [
        rate
        for path in studies
        for rate in of_study(path)
        if rate[0].predict(rate[1]).step.bottleneck == "compute"
        and rate[1].micro_batch_size >= SMALLEST_MICRO_BATCH
        and rate[1].zero_stage < 3
        and rate[1].offload_optimizer == "off"
    ]

    def constants(factors: Sequence[float]) -> StepConstants:
        values = {name: getattr(default, name) * factor for name, factor in zip(FITTED, factors, strict=True)}
        return dataclasses.replace(default, **values)

    def residuals(factors: Sequence[float]) -> list[float]:
        tried = constants(factors)
        models = {
            id(model): CostModel(model.workload, model.hardware, architecture=model.architecture, step_constants=tried)
            for model, _, _ in rates
        }
        return [
            math.log(models[id(model)].predict(config).step.samples_per_second / measured)
            for model, config, measured in rates
        ]

    found = least_squares(residuals, [1.0] * len(FITTED), loss="soft_l1", f_scale=LEVEL)
    return constants([float(factor) for factor in found.x])


def row(path: Path) -> list[str]:
    """A surface's line of the table."""
    errors: dict[str, list[float]] = {"compute": [], "launch": [], "launch at ZeRO-3": []}
    for model, config, measured in of_surface(path):
        step = model.predict(config).step
        kind = step.bottleneck + (" at ZeRO-3" if step.bottleneck == "launch" and config.zero_stage == 3 else "")
        errors.setdefault(kind, []).append(abs(step.samples_per_second / measured - 1))
    return [f"`{path.stem}`", *(cell(errors[kind]) for kind in ("compute", "launch", "launch at ZeRO-3"))]


def cell(errors: Sequence[float]) -> str:
    return f"{len(errors)}: {statistics.median(errors):.0%}, {max(errors):.0%}" if errors else "–"


def coverage(path: Path, seeds: int, *, trials: int = 9) -> float:
    """Fraction of the rates that random searches of some trials left open which lie inside their 95% interval."""
    surface = read_recording(path)
    configs = [config for config, outcome in surface.outcomes.items() if isinstance(outcome, Measurement)]
    grid = CostModel(surface.workload, hardware_of(surface.machine)).grid(configs)
    capacity_bytes = float(surface.machine.capacity_bytes)
    observations = [
        observation
        for row, config in enumerate(configs)
        if (observation := observation_of(row, surface.outcomes[config], capacity_bytes)) is not None
    ]
    inside = []
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(configs))
        rates = calibrate_rates(grid, [observations[row] for row in order[:trials]])
        for row in order[trials:]:
            inside.append(abs((observations[row].log_rate or 0.0) - rates.mean[row]) < 1.96 * rates.deviation[row])
    return statistics.fmean(inside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", action="store_true", help="print the constants of compute that fit the studies")
    parser.add_argument("--intervals", action="store_true", help="print how often 95%% intervals hold what is measured")
    parser.add_argument("--seeds", type=int, default=50, help="random searches of each surface, for --intervals")
    arguments = parser.parse_args()
    if arguments.intervals:
        shown = [[path.stem, f"{coverage(path, arguments.seeds):.1%}"] for path in sorted(DATA.glob("*.jsonl"))]
        print(tabulate.tabulate(shown, ["surface", "in 95% interval"], tablefmt="pipe", disable_numparse=True))
        return
    if arguments.fit:
        default, found = StepConstants(), fitted(sorted((DATA / "studies").glob("*.json")))
        lines = [[name, f"{getattr(default, name):.3g}", f"{getattr(found, name):.3g}"] for name in FITTED]
        print(tabulate.tabulate(lines, ["constant", "in use", "fitted"], tablefmt="pipe", disable_numparse=True))
        return
    surfaces = [*sorted(DATA.glob("*.jsonl")), *sorted((DATA / "models").glob("*.jsonl"))]
    headings = ["surface", "compute decides", "launching does, ZeRO-0 to 2", "launching does, ZeRO-3"]
    print(tabulate.tabulate([row(path) for path in surfaces], headings, tablefmt="pipe", disable_numparse=True))


if __name__ == "__main__":
    main()
