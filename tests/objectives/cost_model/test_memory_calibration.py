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
    LOST_SHARE,
    PEAK_ERROR_PRIORS,
    Fragments,
    MemoryPosterior,
    calibrate_memory,
)
from ds_tune.objectives.cost_model.model import CostModel, grid_of
from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.recorded.recording import read_recording
from ds_tune.objectives.trial import Failure, Measurement, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

DATA = Path(__file__).parents[3] / "benchmarks" / "data"
SURFACE = read_recording(DATA / "2xH100.gpt2-xl.24GiB.jsonl")
OUTCOMES = {config.name: outcome for config, outcome in SURFACE.outcomes.items()}
GRID = grid_of(CostModel(SURFACE.workload, hardware_of(SURFACE.machine)), tuple(SURFACE.outcomes))
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


def test_what_ran_out_and_what_ran_tell_about_another_that_comes_as_near() -> None:
    assert isinstance(OUTCOMES[SURPRISE], Failure)
    row, other = ROW[SURPRISE], ROW[AS_NEAR]
    before, ran_out = beliefs(), beliefs(observed(SURPRISE))
    ran = beliefs(Observation(row=row, peak_bytes=0.99 * CAPACITY))
    assert ran_out.fits[other] < 0.8 * before.fits[other]
    # It is the machine that is known better.
    assert ran_out.fragments[0].share > before.fragments[0].share > ran.fragments[0].share


def test_what_the_formulas_were_right_about_is_not_believed_to_need_more_for_one_that_ran_out() -> None:
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


@pytest.mark.parametrize(("factor", "trusted"), [(1.0, 0), (0.98, 0), (1.3, 1), (0.7, 1)])
def test_one_measured_peak_says_how_far_the_formulas_can_be_trusted(factor: float, trusted: int) -> None:
    row = ROW["z1_ac1_gas1_tmbspg12"]
    memory = calibrate_memory(GRID, [Observation(row=row, peak_bytes=factor * GRID.peak_bytes[row])], 80 * GIB)
    assert memory.weights.sum() == pytest.approx(1)
    assert memory.weights[trusted] > 0.85
    assert memory.weights[trusted] > PEAK_ERROR_PRIORS[trusted].prior_weight


def test_an_answer_that_is_refuted_excludes_nothing() -> None:
    """By formulas that are trusted, 30% too much is certainly too much; where they are, it may not be."""
    row, above = ROW["z1_ac1_gas1_tmbspg12"], ROW["z1_ac1_gas1_tmbspg16"]
    capacity = GRID.peak_bytes[above] / 1.25
    trusted, refuted = (
        calibrate_memory(GRID, [Observation(row=row, peak_bytes=factor * GRID.peak_bytes[row])], capacity)
        for factor in (1.0, 0.75)
    )
    assert trusted.certainly_too_large[above] and not refuted.certainly_too_large[above]


def test_of_two_with_the_same_peak_the_one_in_larger_pieces_is_less_likely_to_fit() -> None:
    large = np.linspace(0.5 * GIB, 6 * GIB, len(GRID))
    half = np.full(len(GRID), 0.45 * CAPACITY)
    grid = dataclasses.replace(GRID, peak_bytes=2 * half, states_bytes=half, activation_bytes=half, large_bytes=large)
    fits = calibrate_memory(grid, [], CAPACITY).fits
    assert (np.diff(fits) < 0).all()
    assert fits[0] > 0.8 and fits[-1] < 0.3


def test_what_ran_with_room_to_spare_says_nothing() -> None:
    assert beliefs().fragments == (Fragments(CAPACITY),) * len(PEAK_ERROR_PRIORS)


def test_what_ran_in_an_earlier_study_says_nothing() -> None:
    """It may have had more memory, and no need of fragments."""
    large = Observation(row=ROW["z1_gas1_tmbspg4"], peak_bytes=1.3 * CAPACITY, from_this_study=False)
    assert beliefs(large).fragments == beliefs().fragments


def test_one_configuration_never_says_everything() -> None:
    """A single one may differ from the rest of its study."""
    fragments = Fragments(CAPACITY).given(1.2, 0.0)
    assert LOST_SHARE < fragments.share < 1
    assert 0 < fragments.variance < Fragments(CAPACITY).variance


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
        grid = grid_of(costs, [config])
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


def test_what_was_likelier_to_fit_ran_more_often() -> None:
    """The runs from which the share was taken: every one of them near the edge."""
    every = sorted(run for model in ("gpt2-medium", "gpt2-xl") for run in runs(model))
    assert len(every) == 57
    half = len(every) // 2
    less, more = (np.mean([ran for _, ran in part]) for part in (every[:half], every[half:]))
    assert less < 0.45 and more > 0.6
    assert sum(fits for fits, _ in every) == pytest.approx(sum(ran for _, ran in every), abs=6)
