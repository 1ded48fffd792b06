"""The formulas alone beside every trial of the studies that were run on GPUs and committed."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from objectives.cost_model.hardware import hardware_of
from objectives.cost_model.model import CostModel, Prediction
from objectives.machine import Machine
from objectives.trial import TrialConfig
from objectives.workload import Workload

ROOT = Path(__file__).parents[3]
STUDIES = sorted((ROOT / "benchmarks" / "data" / "studies").glob("*.json"))
CLAIMS = " ".join((ROOT / "docs" / "cost-model.md").read_text().split())

LARGE_MICRO_BATCH = 6


def trials_beside_predictions(path: Path) -> list[tuple[TrialConfig, dict[str, Any], Prediction]]:
    """The configurations of a study that ran, what each measured, and what would have been predicted."""
    study = json.loads(path.read_text())
    workload = Workload(**{key: study["model"][key] for key in ("model", "seq_len", "dtype")})
    machine = {key: value for key, value in study["hardware"].items() if key != "description"}
    model = CostModel(workload, hardware_of(Machine.from_json(machine)))
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
    assert f"Over the {len(errors)} trials on H100s and H200s" in CLAIMS
    assert f"off by {statistics.median(errors):.1%} in the median and {max(errors):.0%} at most" in CLAIMS


def test_what_ran_was_never_held_for_certain_not_to_fit(
    trials: list[tuple[TrialConfig, dict[str, Any], Prediction]],
) -> None:
    for config, trial, found in trials:
        assert found.memory.peak_bytes < 1.05 * trial["peak_memory_bytes"], config.name
