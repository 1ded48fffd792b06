"""A rank's result, made without a rank."""

import pytest

from ds_tune.objectives.running.protocol import RankResult


@pytest.fixture
def rank_result() -> RankResult:
    return RankResult(
        step_seconds=(1.0, 1.0),
        step_ci95_seconds=(0.9, 1.1),
        from_parts=None,
        forward_seconds=0.25,
        backward_seconds=0.5,
        optimizer_seconds=0.125,
        warmup_step_seconds=(2.0,),
        first_steps_seconds=0.5,
        stopped_early=False,
        drifting=False,
        skipped_steps=0,
        deepspeed_samples_per_second=3.0,
        peak_memory_bytes=10,
        reserved_memory_bytes=20,
        alloc_retries=0,
        setup_seconds=4.0,
        model_parameters=100,
        flops_per_sample=600.0,
    )
