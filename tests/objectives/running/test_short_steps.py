"""Configurations with many micro-steps: really timed by short steps, with ranks that go on."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ds_tune.objectives.running.deepspeed_objective import DeepSpeedObjective
from ds_tune.objectives.timing.intervals import throughput
from ds_tune.objectives.timing.step_plan import StepPlan
from ds_tune.objectives.trial import Measurement, Outcome, TrialConfig

MIB = 2**20
GAS = 1600
# On a CPU a step of so many tiny micro-steps takes about ten seconds. Here every step counts as a long one.
PLAN = StepPlan(
    min_timed_steps=2, max_timed_steps=2, long_step_seconds=0.0, short_step_seconds=0.05, long_trial_seconds=1.0
)
WHOLE = dataclasses.replace(PLAN, short_step_seconds=0.0)
FAR_FASTER = 1e6


def config(zero_stage: int, gas: int = GAS) -> TrialConfig:
    return TrialConfig(zero_stage=zero_stage, micro_batch_size=1, gradient_accumulation_steps=gas)


@pytest.fixture
def study(
    objective: Callable[..., DeepSpeedObjective], tmp_path: Path
) -> Callable[..., tuple[list[Outcome], list[str]]]:
    """Runs configurations one after the other against a best, and tells what was noticed besides."""

    def run(*configs: TrialConfig, best: float | None = None, plan: StepPlan = PLAN) -> tuple[list[Outcome], list[str]]:
        notices: list[str] = []
        tuned = objective(plan=plan, notice=notices.append)
        outcomes = []
        for each in configs:
            folder = tmp_path / each.name
            folder.mkdir(exist_ok=True)
            outcomes.append(tuned.run(each, folder, lambda phase: None, best_samples_per_second=best))
        return outcomes, notices

    return run


def from_parts(outcome: Outcome, stage: int) -> Measurement:
    """The measurement of a trial whose step was put together."""
    assert isinstance(outcome, Measurement), outcome
    parts = outcome.from_parts
    assert parts is not None
    assert parts.gradient_accumulation_steps == GAS
    assert 4 <= parts.micro_steps < GAS
    assert len(parts.first_seconds) == len(parts.closing_seconds) >= 1
    assert outcome.step_seconds == (parts.step_seconds,)
    rate, interval = throughput(outcome.step_seconds, 2 * GAS, parts.ci95())
    assert (outcome.samples_per_second, outcome.samples_per_second_ci95) == (rate, interval)
    assert len(outcome.warmup_step_seconds) == PLAN.warmup(stage)
    assert math.fsum(outcome.warmup_step_seconds) < parts.step_seconds, "the warm-up's steps have three micro-steps"
    calls = outcome.forward_seconds + outcome.backward_seconds + outcome.optimizer_seconds
    assert calls == pytest.approx(parts.step_seconds, rel=0.5)
    assert outcome.optimizer_seconds > 0, "short steps run the optimizer, too"
    assert outcome.deepspeed_samples_per_second is None, "it would take short steps for whole ones"
    assert Measurement.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome
    return outcome


def test_each_stage_is_timed_by_short_steps_and_the_ranks_go_on(
    study: Callable[..., tuple[list[Outcome], list[str]]],
    started_ranks: Callable[[], list[psutil.Process]],
) -> None:
    *long, few = [config(stage) for stage in (3, 0, 2, 1)] + [config(3, gas=3)]
    outcomes, notices = study(*long, few)
    assert notices == [], "the ranks were replaced"
    for each, outcome in zip(long, outcomes, strict=False):
        assert not from_parts(outcome, each.zero_stage).stopped_early
    assert isinstance(outcomes[-1], Measurement)
    assert (outcomes[-1].from_parts, len(outcomes[-1].step_seconds)) == (None, 2), "whole steps were timed"
    assert len(started_ranks()) == 2, "ranks that decide differently wait for each other for ever"


def test_a_trial_that_is_clearly_slower_than_the_best_ends_after_one_short_step(
    study: Callable[..., tuple[list[Outcome], list[str]]],
) -> None:
    plan = dataclasses.replace(PLAN, parts_precision=0.0, timed_seconds=60.0, long_trial_seconds=60.0)
    [outcome], _ = study(config(1), best=FAR_FASTER, plan=plan)
    slow = from_parts(outcome, 1)
    assert slow.stopped_early
    assert slow.from_parts is not None and slow.from_parts.micro_steps < GAS / 2


def test_nothing_is_left_of_an_engine_that_ran_short_steps(
    study: Callable[..., tuple[list[Outcome], list[str]]],
) -> None:
    outcomes, notices = study(*[config(3)] * 8)
    peaks = [from_parts(outcome, 3).peak_memory_bytes for outcome in outcomes]
    assert notices == []
    assert peaks[-1] - peaks[1] < 64 * MIB


@pytest.mark.parametrize("stage", [0, 3])
def test_whole_steps_of_the_same_configuration_have_what_the_parts_multiply(
    study: Callable[..., tuple[list[Outcome], list[str]]], stage: int
) -> None:
    """Seconds are not compared: the machine may be busy."""
    [parts], _ = study(config(stage, gas=40), plan=dataclasses.replace(PLAN, short_step_seconds=1e-6))
    [whole], _ = study(config(stage, gas=40), plan=WHOLE)
    assert isinstance(parts, Measurement) and isinstance(whole, Measurement)
    assert parts.from_parts is not None and whole.from_parts is None
    assert len(whole.step_seconds) == 2
    assert min(parts.from_parts.plain_seconds) * 40 < 2 * max(whole.step_seconds)
    assert whole.deepspeed_samples_per_second is not None
