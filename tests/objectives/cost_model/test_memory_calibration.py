"""What fits near the end of the memory: two H100s with 24 GiB, and single configurations under ever smaller caps."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds_tune.objectives.cost_model.calibration import Observation, observation_of
from ds_tune.objectives.cost_model.hardware import Hardware, hardware_of
from ds_tune.objectives.cost_model.memory_calibration import (
    MemoryPosterior,
    calibrate_memory,
)
from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.recorded.recording import read_recording
from ds_tune.objectives.trial import Failure, Measurement, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

DATA = Path(__file__).parents[3] / "benchmarks" / "data"
SURFACE = read_recording(DATA / "2xH100.gpt2-xl.24GiB.jsonl")
OUTCOMES = {config.name: outcome for config, outcome in SURFACE.outcomes.items()}
GRID = CostModel(SURFACE.workload, hardware_of(SURFACE.machine)).grid(tuple(SURFACE.outcomes))
ROW = {config.name: row for row, config in enumerate(GRID.configs)}
CAPACITY = float(SURFACE.machine.capacity_bytes)

SURPRISE = "z1_ac1_gas4_tmbspg8"
"""It ran out, at a predicted 90% of the memory."""
AS_NEAR = "z2_ac1_gas4_tmbspg12"
"""It needs a predicted 92%."""


def observed(name: str) -> Observation:
    found = observation_of(ROW[name], OUTCOMES[name], CAPACITY)
    assert found is not None
    return found


def beliefs(*observations: Observation) -> MemoryPosterior:
    known = [observed(f"z{stage}_ac1_gas1_tmbspg{size}") for stage in (1, 2) for size in (4, 8)]
    return calibrate_memory(GRID, [*known, *observations], CAPACITY)


def test_a_run_out_of_memory_makes_one_that_comes_as_near_less_likely_to_fit() -> None:
    assert isinstance(OUTCOMES[SURPRISE], Failure)
    row, other = ROW[SURPRISE], ROW[AS_NEAR]
    before, ran_out = beliefs(), beliefs(observed(SURPRISE))
    assert ran_out.fits[other] < 0.95 * before.fits[other]
    assert ran_out.fits[row] == 0 < before.fits[row]


def test_out_of_memory_by_fragmentation_leaves_correct_peak_predictions_unchanged() -> None:
    """It was lost to fragments."""
    peaks = {
        ROW[config.name]: outcome.peak_memory_bytes
        for config, outcome in SURFACE.outcomes.items()
        if isinstance(outcome, Measurement)
    }
    memory = calibrate_memory(GRID, [observed("z1_gas1_tmbspg1"), observed(SURPRISE)], CAPACITY)
    errors = [abs(memory.mean_bytes[row] / peak - 1) for row, peak in peaks.items()]
    assert np.median(errors) < 0.01
    assert max(errors) < 0.04


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.3])
def test_one_measured_peak_corrects_another_by_most_of_its_factor(factor: float) -> None:
    row, other = ROW["z1_ac1_gas1_tmbspg12"], ROW["z2_ac1_gas1_tmbspg16"]
    memory = calibrate_memory(GRID, [Observation(row=row, peak_bytes=factor * GRID.peak_bytes[row])], 80 * GIB)
    assert memory.mean_bytes[row] == pytest.approx(factor * GRID.peak_bytes[row], rel=0.01)
    assert memory.mean_bytes[other] == pytest.approx(factor * GRID.peak_bytes[other], rel=0.05)


def test_equal_peak_in_larger_allocations_is_less_likely_to_fit() -> None:
    large = np.linspace(0.5 * GIB, 6 * GIB, len(GRID))
    half = np.full(len(GRID), 0.45 * CAPACITY)
    grid = dataclasses.replace(GRID, peak_bytes=2 * half, states_bytes=half, activation_bytes=half, large_bytes=large)
    fits = calibrate_memory(grid, [], CAPACITY).fits
    assert (np.diff(fits) < 0).all()
    assert fits[0] > 0.8 and fits[-1] < 0.3


def runs(model: str) -> list[tuple[float, bool]]:
    """Of each recorded run under a cap, how likely it was to fit and whether it ran."""
    head, *rows = [json.loads(text) for text in (DATA / "fragments" / f"1xH100.{model}.jsonl").read_text().splitlines()]
    found = []
    for row in rows:
        costs = CostModel(
            HuggingFaceWorkload(**{key: head[key] for key in ("model", "seq_len", "dtype")}), capped(head, row)
        )
        config = TrialConfig(
            zero_stage=row["stage"],
            micro_batch_size=row["mbs"],
            gradient_accumulation_steps=row["gas"],
            activation_checkpointing=row["ckpt"],
        )
        grid = costs.grid([config])
        memory = calibrate_memory(grid, [], float(costs.hardware.capacity_bytes))
        found.append((float(memory.fits[0]), not row["oom"]))
    return found


def capped(head: dict[str, Any], row: dict[str, Any]) -> Hardware:
    return hardware_of(
        Machine(
            device="cuda",
            name=head["hardware"].partition("x")[2],
            ranks=head["ranks"],
            memory_bytes=int(head["memory_cap_gib"] * GIB),
            memory_cap_bytes=int(row["cap_gib"] * GIB),
        )
    )


def test_recorded_runs_with_higher_predicted_odds_of_fitting_ran_more_often() -> None:
    """The runs from which the share was taken: every one of them near the edge."""
    every = sorted(run for model in ("gpt2-medium", "gpt2-xl") for run in runs(model))
    assert len(every) == 57
    half = len(every) // 2
    less, more = (np.mean([ran for _, ran in part]) for part in (every[:half], every[half:]))
    assert less < 0.45 and more > 0.6
    assert sum(fits for fits, _ in every) == pytest.approx(sum(ran for _, ran in every), abs=6)
