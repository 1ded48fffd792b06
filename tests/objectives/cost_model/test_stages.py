"""ZeRO-0, 1 and 2 compute the same: what one shows is half expected of the others. Two H100s with 32 GiB; an H200."""

import dataclasses
from pathlib import Path

import pytest

from ds_tune.objectives.cost_model import calibration
from ds_tune.objectives.cost_model.calibration import Observation, calibrate_rates, observation_of
from ds_tune.objectives.cost_model.grid import Floats
from ds_tune.objectives.cost_model.hardware import hardware_of
from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.recorded.recording import read_recording
from ds_tune.objectives.trial import Measurement

DATA = Path(__file__).parents[3] / "benchmarks" / "data"
SURFACE = read_recording(DATA / "2xH100.gpt2-xl.32GiB.jsonl")
SURFACE_OF_ONE = DATA / "1xH200.gpt2-xl.jsonl"
GRID = CostModel(SURFACE.workload, hardware_of(SURFACE.machine)).grid(tuple(SURFACE.outcomes))
ROW = {config.name: row for row, config in enumerate(GRID.configs)}
SMALL = [f"z{stage}_ac1_gas4_tmbspg8" for stage in (1, 2, 3)]
LARGE_1, LARGE_2, LARGE_3 = (f"z{stage}_ac1_gas4_tmbspg16" for stage in (1, 2, 3))


def observed(name: str) -> Observation:
    outcome = SURFACE.outcomes[GRID.configs[ROW[name]]]
    assert isinstance(outcome, Measurement)
    found = observation_of(ROW[name], outcome, float(SURFACE.machine.capacity_bytes))
    assert found is not None
    return found


def moved() -> Floats:
    """What ZeRO-2 with a large micro-batch adds to what small ones showed, if it is a tenth faster than it was."""
    known, large = [observed(name) for name in SMALL], observed(LARGE_2)
    assert large.log_rate is not None
    faster = dataclasses.replace(large, log_rate=large.log_rate + 0.1)
    return calibrate_rates(GRID, [*known, faster]).mean - calibrate_rates(GRID, known).mean


def test_faster_zero_2_measurement_raises_zero_1_prediction_in_part_and_zero_3_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together = moved()
    monkeypatch.setattr(calibration, "STAGES_IN_COMMON", 0.0)
    apart = moved()
    assert together[ROW[LARGE_2]] > 0
    assert together[ROW[LARGE_2]] > together[ROW[LARGE_1]] > apart[ROW[LARGE_1]]
    assert together[ROW[LARGE_1]] > together[ROW[LARGE_3]]


def test_on_one_gpu_it_is_nearly_all_expected_of_zero_1() -> None:
    """There is nothing to partition or to reduce."""
    surface = read_recording(SURFACE_OF_ONE)
    configs = tuple(surface.outcomes)
    grid = CostModel(surface.workload, hardware_of(surface.machine)).grid(configs)
    row = {config.name: number for number, config in enumerate(configs)}
    slow = Observation(row=row["z2_gas1_tmbspg8"], log_rate=float(grid.log_rate[row["z2_gas1_tmbspg8"]]) - 0.3)
    moved = calibrate_rates(grid, [slow]).mean - grid.log_rate
    zero_0, zero_1, zero_2, zero_3 = (moved[row[f"z{stage}_gas1_tmbspg8"]] for stage in range(4))
    assert zero_1 == pytest.approx(zero_2, abs=0.02)
    assert zero_0 == pytest.approx(zero_2, abs=0.02)
    assert zero_3 > zero_1 + 0.01, "it gathers, and is less alike"
