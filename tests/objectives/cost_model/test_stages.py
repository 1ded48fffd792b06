"""ZeRO-0, 1 and 2 compute the same: what one of them shows is half expected of the others. Two H100s with 32 GiB."""

from pathlib import Path

import pytest

from objectives.cost_model import calibration
from objectives.cost_model.calibration import Observation, calibrate_rates, observation_of
from objectives.cost_model.hardware import hardware_of
from objectives.cost_model.model import CostModel, Floats, grid_of
from objectives.surface import read_surface
from objectives.trial import Measurement

SURFACE = read_surface(Path(__file__).parents[3] / "benchmarks" / "data" / "2xH100.gpt2-xl.32GiB.jsonl")
GRID = grid_of(CostModel(SURFACE.workload, hardware_of(SURFACE.machine)), tuple(SURFACE.outcomes))
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
    """What ZeRO-2 with a large micro-batch adds to what small ones showed."""
    known = [observed(name) for name in SMALL]
    return calibrate_rates(GRID, [*known, observed(LARGE_2)]).mean - calibrate_rates(GRID, known).mean


def test_what_zero_2_shows_is_half_expected_of_zero_1(monkeypatch: pytest.MonkeyPatch) -> None:
    together = moved()
    monkeypatch.setattr(calibration, "STAGES_IN_COMMON", 0.0)
    apart = moved()
    assert together[ROW[LARGE_2]] > 0, "it was faster than expected"
    assert together[ROW[LARGE_2]] > together[ROW[LARGE_1]] > apart[ROW[LARGE_1]]
    assert together[ROW[LARGE_1]] > together[ROW[LARGE_3]]
