"""Beliefs before the first trial, where a model is known and where it is not."""

import numpy as np
import pytest

from ds_tune.objectives.cost_model.calibration import Observation, calibrate_rates
from ds_tune.objectives.cost_model.hardware import parse_hardware
from ds_tune.objectives.cost_model.memory_calibration import calibrate_memory
from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.cost_model.prior import FlatPrior, Prior
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

HARDWARE = parse_hardware("2xH100-80GB")
XL = HuggingFaceWorkload(model="gpt2-xl", seq_len=1024, dtype="fp16")
CONFIGS = [
    TrialConfig(zero_stage=stage, micro_batch_size=size, gradient_accumulation_steps=gas)
    for stage in range(4)
    for size in (1, 2, 4, 8, 16, 32)
    for gas in (1, 4)
]
CAPACITY = float(HARDWARE.capacity_bytes)
FLAT = FlatPrior(HARDWARE)
GRID = FLAT.grid(CONFIGS)


@pytest.mark.parametrize("prior", [CostModel(XL, HARDWARE), FLAT], ids=["formulas", "flat"])
def test_prior_has_a_rate_and_a_peak_for_each_configuration(prior: Prior) -> None:
    grid = prior.grid(CONFIGS)
    assert len(grid) == len(CONFIGS)
    assert np.isfinite(grid.log_rate).all()
    assert (grid.peak_bytes > 0).all()


def test_flat_prior_prefers_no_configuration_before_anything_is_measured() -> None:
    rates = calibrate_rates(GRID, [], FLAT.error_priors)
    assert np.ptp(rates.mean) == 0.0
    memory = calibrate_memory(GRID, [], CAPACITY, errors=FLAT.memory_errors)
    assert not memory.certainly_too_large.any()
    assert 0.5 < memory.fits[0] < 1.0


def test_flat_prior_learns_rates_of_configurations_alike_from_one() -> None:
    row = CONFIGS.index(TrialConfig(zero_stage=1, micro_batch_size=8, gradient_accumulation_steps=4))
    seen = [Observation(row=0, log_rate=1.0), Observation(row=row, log_rate=3.0)]
    rates = calibrate_rates(GRID, seen, FLAT.error_priors)
    near = CONFIGS.index(TrialConfig(zero_stage=1, micro_batch_size=16, gradient_accumulation_steps=4))
    far = CONFIGS.index(TrialConfig(zero_stage=0, micro_batch_size=2, gradient_accumulation_steps=1))
    assert rates.mean[near] > rates.mean[far] + 0.5
    assert rates.deviation[row] < rates.deviation[near]


def test_flat_prior_learns_from_an_out_of_memory_that_larger_micro_batches_fit_less() -> None:
    def fits(seen: list[Observation]) -> dict[int, float]:
        memory = calibrate_memory(GRID, seen, CAPACITY, errors=FLAT.memory_errors)
        return {
            CONFIGS[row].micro_batch_size: float(memory.fits[row])
            for row in range(len(CONFIGS))
            if CONFIGS[row].zero_stage == 1 and CONFIGS[row].gradient_accumulation_steps == 1
        }

    ran_out = CONFIGS.index(TrialConfig(zero_stage=1, micro_batch_size=8, gradient_accumulation_steps=1))
    ran = CONFIGS.index(TrialConfig(zero_stage=1, micro_batch_size=4, gradient_accumulation_steps=1))
    before = fits([])
    after = fits([Observation(row=ran_out, ran_out=True), Observation(row=ran, peak_bytes=0.6 * CAPACITY)])
    assert after[16] < before[16] / 2
    assert after[2] > before[2]
    assert after[1] > 0.95
