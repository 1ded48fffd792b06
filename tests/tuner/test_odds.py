"""The odds that a configuration is as good as the best there is, and what they choose. On two recorded H100s."""

from pathlib import Path

import numpy as np
import pytest

from ds_tune.objectives.cost_model.calibration import Observation, calibrate_rates, observation_of
from ds_tune.objectives.cost_model.hardware import hardware_of
from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.recorded.recording import Recording, read_recording
from ds_tune.objectives.trial import Measurement
from ds_tune.tuner.proposer import AS_GOOD, Proposer

DATA = Path(__file__).parents[2] / "benchmarks" / "data"
SURFACE = read_recording(DATA / "2xH100.gpt2-xl.jsonl")
MODEL = CostModel(SURFACE.workload, hardware_of(SURFACE.machine))
CONFIGS = tuple(SURFACE.outcomes)
ROW = {config.name: row for row, config in enumerate(CONFIGS)}


def observed(surface: Recording, row: int) -> Observation:
    found = observation_of(row, surface.outcomes[tuple(surface.outcomes)[row]], surface.machine.capacity_bytes)
    assert found is not None
    return found


def proposed(proposer: Proposer, observations: list[Observation]) -> int:
    proposal = proposer.propose(observations, [each.row for each in observations], np.random.default_rng(0))
    assert proposal is not None
    row = proposer.row(proposal.config)
    assert row is not None
    return row


def test_draws_have_the_moments_of_what_is_believed() -> None:
    grid = Proposer(MODEL, CONFIGS).grid
    rates = calibrate_rates(
        grid, [observed(SURFACE, ROW["z0_gas1_tmbspg1"]), observed(SURFACE, ROW["z1_gas1_tmbspg8"])]
    )
    rows = np.array([ROW["z2_gas1_tmbspg8"], ROW["z3_gas4_tmbspg4"], ROW["z0_gas4_tmbspg8"]])
    drawn = rates.draws(rows, 40_000, np.random.default_rng(1))
    assert drawn.mean(axis=0) == pytest.approx(rates.mean[rows], abs=0.01)
    assert drawn.std(axis=0) == pytest.approx(rates.deviation[rows], rel=0.03)


def test_rate_draws_of_neighbouring_micro_batches_share_their_common_error() -> None:
    """Before anything is measured the level may be off by half, but not one micro-batch against the next."""
    rows = np.array([ROW["z1_gas1_tmbspg8"], ROW["z1_gas1_tmbspg12"]])
    drawn = calibrate_rates(Proposer(MODEL, CONFIGS).grid, []).draws(rows, 4000, np.random.default_rng(1))
    assert (drawn[:, 0] - drawn[:, 1]).std() < 0.2 * drawn[:, 0].std()


@pytest.mark.parametrize(
    ("name", "trials"),
    [("2xH100.gpt2-xl", 4), ("2xH100.gpt2-xl.32GiB", 3), ("1xH100.gpt2-large-512.24GiB", 2)],
)
def test_from_the_baseline_on_few_trials_are_enough_for_what_is_as_good_as_the_best(name: str, trials: int) -> None:
    surface = read_recording(DATA / f"{name}.jsonl")
    configs = tuple(surface.outcomes)
    proposer = Proposer(CostModel(surface.workload, hardware_of(surface.machine)), configs)
    observations: list[Observation] = []
    for config in proposer.baselines([config for config in configs if config.name.endswith("gas1_tmbspg1")], []):
        observations.append(observed(surface, configs.index(config)))
        if not observations[-1].ran_out:
            break
    before = len(observations) - 1
    while len(observations) < before + trials:
        observations.append(observed(surface, proposed(proposer, observations)))
    rates = [outcome.samples_per_second for outcome in surface.outcomes.values() if isinstance(outcome, Measurement)]
    found = max(each.log_rate for each in observations if each.log_rate is not None)
    assert found >= np.log(max(rates)) - AS_GOOD


def test_once_the_best_is_found_next_to_nothing_is_expected_to_be_gained() -> None:
    proposer = Proposer(MODEL, CONFIGS)
    fastest = sorted(
        (row for row, config in enumerate(CONFIGS) if isinstance(SURFACE.outcomes[config], Measurement)),
        key=lambda row: observed(SURFACE, row).log_rate or 0.0,
    )
    observations = [observed(SURFACE, row) for row in fastest[::-3]]
    proposal = proposer.propose(observations, [each.row for each in observations], np.random.default_rng(0))
    assert proposal is not None and proposal.expected_gain < AS_GOOD
