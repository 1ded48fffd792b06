"""What fits near the end of the memory is learned from what ran there and what ran out: two H100s with 24 GiB."""

from pathlib import Path

import pytest

from objectives.cost_model.calibration import (
    FRAGMENTATION,
    Fragments,
    MemoryPosterior,
    Observation,
    calibrate_memory,
    observation_of,
)
from objectives.cost_model.hardware import hardware_of
from objectives.cost_model.model import CostModel, grid_of
from objectives.surface import read_surface
from objectives.trial import Failure

SURFACE = read_surface(Path(__file__).parents[3] / "benchmarks" / "data" / "2xH100.gpt2-xl.24GiB.jsonl")
OUTCOMES = {config.name: outcome for config, outcome in SURFACE.outcomes.items()}
GRID = grid_of(CostModel(SURFACE.workload, hardware_of(SURFACE.machine)), tuple(SURFACE.outcomes))
ROW = {config.name: row for row, config in enumerate(GRID.configs)}
CAPACITY = float(SURFACE.machine.capacity_bytes)

ZERO_1, ZERO_2 = "z1_ac1_gas1_tmbspg16", "z2_ac1_gas1_tmbspg16"
"""Two that need the same, 97% of the memory."""


def observed(name: str) -> Observation:
    found = observation_of(ROW[name], OUTCOMES[name], CAPACITY)
    assert found is not None
    return found


def beliefs(*observations: Observation) -> MemoryPosterior:
    known = [observed(f"z{stage}_ac1_gas1_tmbspg{size}") for stage in (1, 2) for size in (8, 12)]
    return calibrate_memory(GRID, [*known, *observations], CAPACITY)


def test_of_two_that_need_the_same_one_tells_about_the_other() -> None:
    assert isinstance(OUTCOMES[ZERO_1], Failure) and isinstance(OUTCOMES[ZERO_2], Failure)
    before, ran_out = beliefs(), beliefs(observed(ZERO_1))
    ran = beliefs(Observation(row=ROW[ZERO_1], peak_bytes=float(before.mean_bytes[ROW[ZERO_1]])))
    assert 0.4 < before.fits[ROW[ZERO_2]] < 0.8
    assert ran_out.fits[ROW[ZERO_2]] < 0.6 * before.fits[ROW[ZERO_2]]
    assert ran.fits[ROW[ZERO_2]] > 1.1 * before.fits[ROW[ZERO_2]]
    # It is the machine that is known better; what the configurations need was known.
    assert ran_out.fragments.mean > before.fragments.mean > ran.fragments.mean
    assert ran_out.mean_bytes[ROW[ZERO_2]] == pytest.approx(before.mean_bytes[ROW[ZERO_2]], rel=0.01)


def test_what_ran_with_room_to_spare_says_nothing() -> None:
    assert beliefs().fragments == Fragments(CAPACITY)


def test_what_ran_in_an_earlier_study_says_nothing() -> None:
    """It may have had more memory, and no need of fragments."""
    large = Observation(row=ROW["z1_gas1_tmbspg4"], peak_bytes=1.3 * CAPACITY, is_own=False)
    assert beliefs(large).fragments == Fragments(CAPACITY)


def test_one_configuration_never_says_everything() -> None:
    """A single one may differ from the rest of its study."""
    fragments = Fragments(CAPACITY).given(0.05, 0.0)
    assert FRAGMENTATION < fragments.mean < 0.05
    assert 0 < fragments.variance < Fragments(CAPACITY).variance
