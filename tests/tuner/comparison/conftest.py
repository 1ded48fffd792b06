"""Comparisons on the CPU whose runs are written by hand, and no rank is started."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_tune.objectives.machine import GIB
from ds_tune.objectives.timing.intervals import throughput
from ds_tune.objectives.trial import Failure, FailureKind, Measurement, Outcome, TrialConfig
from ds_tune.tuner.comparison.command import ComparisonFolder
from ds_tune.tuner.comparison.ledger import Ledger, Swept
from ds_tune.tuner.comparison.request import CompareRequest
from ds_tune.tuner.comparison.rows import Row
from ds_tune.tuner.comparison.runner import ModelComparison
from ds_tune.tuner.request import TuneRequest

RANKS = 2


def config(stage: int, mbs: int, gas: int = 1) -> TrialConfig:
    return TrialConfig(zero_stage=stage, micro_batch_size=mbs, gradient_accumulation_steps=gas)


def ran(of: TrialConfig, samples_per_second: float) -> Measurement:
    """A measurement of five steps that hardly differ."""
    samples = of.global_batch_size(RANKS)
    mean = samples / samples_per_second
    step_seconds = tuple(mean * (1 + ripple) for ripple in (-0.002, 0.001, 0.0, 0.002, -0.001))
    rate, interval = throughput(step_seconds, samples)
    return Measurement(
        step_seconds=step_seconds,
        samples_per_second=rate,
        samples_per_second_ci95=interval,
        forward_seconds=0.25 * mean,
        backward_seconds=0.5 * mean,
        optimizer_seconds=0.125 * mean,
        deepspeed_samples_per_second=None,
        warmup_step_seconds=(mean,),
        skipped_steps=0,
        peak_memory_bytes=of.micro_batch_size * GIB,
        reserved_memory_bytes=of.micro_batch_size * GIB,
        alloc_retries=0,
        setup_seconds=1.0,
        wall_seconds=2.0,
        model_parameters=1_000_000,
        flops_per_sample=1.0e9,
    )


def failed(kind: FailureKind = FailureKind.OUT_OF_MEMORY, message: str = "rank 0 in forward: out") -> Failure:
    return Failure(kind=kind, message=message, phase="forward")


@pytest.fixture
def comparison(tmp_path: Path) -> Callable[..., ModelComparison]:
    """Makes a comparison of the nano model, of mbs 1 to 4, in a folder of the test's."""

    def make(*, models: tuple[str, ...] = ("gpt2-nano",), **changes: Any) -> ModelComparison:
        fields = {"free_only": True, "rounds": 1, **changes}
        request = CompareRequest(
            models=models,
            request=TuneRequest(
                gpus=0,
                ranks=RANKS,
                seq_len=fields.pop("seq_len", 32),
                max_micro_batch=4,
                max_global_batch=16,
                results=tmp_path,
                ds_config=fields.pop("ds_config", None),
            ),
            **fields,
        )
        asked = request.asked(request.backend_of(models[0], lambda text: None))
        return ModelComparison(models[0], request, Ledger(ComparisonFolder(tmp_path).ledger, asked))

    return make


@pytest.fixture
def sweep() -> Callable[..., None]:
    """Writes down what a row's sweep found, each run of 10 s."""

    def write(of: ModelComparison, row: Row, outcomes: dict[TrialConfig, Outcome]) -> None:
        for each, outcome in outcomes.items():
            of.ledger.add_swept(of.model, row, Swept(config=each, outcome=outcome, seconds=10.0))

    return write
