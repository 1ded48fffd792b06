"""Training without DeepSpeed on two real ranks: it is timed, runs out of memory and learns as DeepSpeed's does."""

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_tune.objectives.numerics import LossCurve
from ds_tune.objectives.running.deepspeed_objective import DeepSpeedObjective
from ds_tune.objectives.running.protocol import DEEPSPEED, VANILLA
from ds_tune.objectives.trial import Failure, FailureKind, Measurement, Outcome, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

Train = Callable[..., Outcome]
ACCUMULATING = TrialConfig(zero_stage=0, micro_batch_size=2, gradient_accumulation_steps=3)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_vanilla_training_is_timed_as_a_trial_is(train: Train, workload: HuggingFaceWorkload, dtype: str) -> None:
    measured = train(ACCUMULATING, trainer=VANILLA, workload=dataclasses.replace(workload, dtype=dtype))
    assert isinstance(measured, Measurement), measured
    mean = statistics.fmean(measured.step_seconds)
    assert measured.samples_per_second == pytest.approx(2 * 2 * 3 / mean)
    parts = measured.forward_seconds + measured.backward_seconds + measured.optimizer_seconds
    assert 0 < parts <= mean
    assert measured.deepspeed_samples_per_second is None
    assert measured.peak_memory_bytes > 100 * 2**20


def test_vanilla_training_that_runs_out_of_memory_is_told_as_that(train: Train, fault: Callable[[str], Path]) -> None:
    fault("rank=1 phase=forward kind=memory")
    config = TrialConfig(zero_stage=0, micro_batch_size=64, gradient_accumulation_steps=1)
    failure = train(config, trainer=VANILLA)
    assert isinstance(failure, Failure), failure
    assert (failure.kind, failure.phase) == (FailureKind.OUT_OF_MEMORY, "forward")


def test_vanilla_training_has_the_losses_of_deepspeed_without_partitioning(
    objective: Callable[..., DeepSpeedObjective], tmp_path: Path
) -> None:
    curves = {}
    for trainer in (VANILLA, DEEPSPEED):
        found = objective(trainer=trainer).losses(ACCUMULATING, tmp_path, lambda phase: None)
        assert isinstance(found, LossCurve), found
        curves[trainer] = found.losses
    assert curves[VANILLA] == pytest.approx(curves[DEEPSPEED], rel=1e-5)
    assert curves[VANILLA][-1] < curves[VANILLA][0] - 0.1
