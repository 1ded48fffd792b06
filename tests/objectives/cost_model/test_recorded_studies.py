"""The formulas alone beside everything that was recorded on GPUs and committed: studies and surfaces."""

import importlib
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from ds_tune.objectives.cost_model.calibration import Observation
from ds_tune.objectives.cost_model.hardware import hardware_of
from ds_tune.objectives.cost_model.memory_calibration import calibrate_memory
from ds_tune.objectives.cost_model.model import CostModel, Prediction
from ds_tune.objectives.machine import Machine
from ds_tune.objectives.recorded.recording import read_recording
from ds_tune.objectives.trial import Measurement, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

ROOT = Path(__file__).parents[3]
STUDIES = sorted((ROOT / "benchmarks" / "data" / "studies").glob("*.json"))
SURFACES = [
    path for folder in (".", "models") for path in sorted((ROOT / "benchmarks" / "data" / folder).glob("*.jsonl"))
]
CLAIMS = " ".join((ROOT / "benchmarks" / "results" / "cost-model.md").read_text().split())

LARGE_MICRO_BATCH = 6


def machine_of_study(study: dict[str, Any]) -> Machine:
    return Machine.from_json({key: value for key, value in study["hardware"].items() if key != "description"})


def model_of_study(study: dict[str, Any]) -> CostModel:
    workload = HuggingFaceWorkload(**{key: study["model"][key] for key in ("model", "seq_len", "dtype")})
    return CostModel(workload, hardware_of(machine_of_study(study)))


def trials_beside_predictions(path: Path) -> list[tuple[TrialConfig, dict[str, Any], Prediction]]:
    """The configurations of a study that ran, what each measured, and what would have been predicted."""
    study = json.loads(path.read_text())
    model = model_of_study(study)
    ran = [(TrialConfig.from_json(each["config"]), each) for each in study["trials"] if each["state"] == "complete"]
    return [(config, each, model.predict(config)) for config, each in ran]


@pytest.fixture(scope="module")
def trials() -> list[tuple[TrialConfig, dict[str, Any], Prediction]]:
    return [trial for path in STUDIES for trial in trials_beside_predictions(path)]


def test_peaks_are_as_near_as_the_documentation_says(
    trials: list[tuple[TrialConfig, dict[str, Any], Prediction]],
) -> None:
    errors = [abs(found.memory.peak_bytes / trial["peak_memory_bytes"] - 1) for _, trial, found in trials]
    claim = f"all {len(errors)} trials there that ran"
    assert claim in CLAIMS
    assert f"{statistics.median(errors):.1%} in the median, {max(errors):.1%} at most" in CLAIMS


@pytest.mark.parametrize("path", SURFACES, ids=lambda path: path.stem)
def test_peaks_of_a_surface_are_as_near_as_the_documentation_says(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where the recorded models' configurations are found
    surface = read_recording(path)
    model = CostModel(surface.workload, hardware_of(surface.machine))
    errors = [
        abs(model.predict(config).memory.peak_bytes / outcome.peak_memory_bytes - 1)
        for config, outcome in surface.outcomes.items()
        if isinstance(outcome, Measurement)
    ]
    assert f"| `{path.stem}` | {len(errors)} | {statistics.median(errors):.1%} | {max(errors):.1%} |" in CLAIMS


@pytest.mark.parametrize("path", [path for path in SURFACES if path.parent.name == "data"], ids=lambda path: path.stem)
def test_intervals_hold_what_is_then_measured_on_every_surface(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """95% intervals of what nine trials left open, over 20 random searches."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    assert 0.87 < importlib.import_module("rate_model").coverage(path, 20) < 0.99


def test_rates_are_as_near_as_the_documentation_says_where_compute_decides(
    trials: list[tuple[TrialConfig, dict[str, Any], Prediction]],
) -> None:
    errors = [
        abs(found.step.samples_per_second / trial["samples_per_second"] - 1)
        for config, trial, found in trials
        if found.step.bottleneck == "compute"
        and config.micro_batch_size >= LARGE_MICRO_BATCH
        and config.offload_optimizer == "off"
    ]
    assert f"Over the {len(errors)} trials there in which compute decides" in CLAIMS
    assert f"off by {statistics.median(errors):.1%} in the median and {max(errors):.0%} at most" in CLAIMS


def test_out_of_memory_near_uncapped_capacity_had_lower_odds_than_nearly_all_runs_that_fit() -> None:
    """As the search saw it: each trial after those before it."""
    ran, ran_out = [], []
    for path in STUDIES:
        study = json.loads(path.read_text())
        if study["hardware"]["memory_cap_bytes"] is not None:
            continue
        hardware = hardware_of(machine_of_study(study))
        grid = model_of_study(study).grid([TrialConfig.from_json(each["config"]) for each in study["trials"]])
        observations: list[Observation] = []
        for row, each in enumerate(study["trials"]):
            memory = calibrate_memory(
                grid, observations, float(hardware.capacity_bytes), outside_bytes=hardware.outside_bytes
            )
            is_near = 0.85 < memory.mean_bytes[row] / hardware.capacity_bytes < 1
            if each["state"] == "complete":
                observations.append(Observation(row=row, peak_bytes=float(each["peak_memory_bytes"])))
            elif each["reason"].startswith("out of memory"):
                observations.append(Observation(row=row, ran_out=True))
            else:
                continue
            if is_near:
                (ran_out if observations[-1].ran_out else ran).append(memory.fits[row])
    assert (len(ran), min(ran)) == (36, pytest.approx(0.71, abs=0.01))
    assert sorted(ran_out) == pytest.approx([0.15, 0.77, 0.92], abs=0.01)


def test_recorded_trials_that_ran_are_never_predicted_certain_not_to_fit(
    trials: list[tuple[TrialConfig, dict[str, Any], Prediction]],
) -> None:
    for config, trial, found in trials:
        assert found.memory.peak_bytes < 1.05 * trial["peak_memory_bytes"], config.name
