"""Hopeless configurations with many micro-steps: really given up within their first step, with ranks that go on."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from objectives.deepspeed_objective import DeepSpeedObjective
from objectives.timing.step_plan import StepPlan
from objectives.trial import Measurement, Outcome, TrialConfig

MIB = 2**20
GAS = 1600
# On a CPU a step of so many tiny micro-steps takes about ten seconds, far longer than anything else on the machine can
# make micro-steps look as if they still got faster; here every step counts as a long one.
PLAN = StepPlan(min_timed_steps=2, max_timed_steps=2, mid_step_seconds=0.0, long_step_seconds=0.0)
FAR_FASTER = 1e6


def config(zero_stage: int, gas: int = GAS) -> TrialConfig:
    return TrialConfig(zero_stage=zero_stage, micro_batch_size=1, gradient_accumulation_steps=gas)


@pytest.fixture
def study(
    objective: Callable[..., DeepSpeedObjective], tmp_path: Path
) -> Callable[..., tuple[list[Outcome], list[str]]]:
    """Runs configurations one after the other against a best, and tells what was noticed besides."""

    def run(*configs: TrialConfig, best: float | None = FAR_FASTER) -> tuple[list[Outcome], list[str]]:
        notices: list[str] = []
        tuned = objective(plan=PLAN, notice=notices.append)
        outcomes = []
        for each in configs:
            folder = tmp_path / each.name
            folder.mkdir(exist_ok=True)
            outcomes.append(tuned.run(each, folder, lambda phase: None, best_samples_per_second=best))
        return outcomes, notices

    return run


def stopped(outcome: Outcome, stage: int) -> Measurement:
    """The measurement of a trial that was given up within its first timed step."""
    assert isinstance(outcome, Measurement), outcome
    assert outcome.stopped_early
    assert outcome.from_micro_steps >= 3
    assert len(outcome.warmup_step_seconds) == PLAN.warmup(stage)
    [estimate] = outcome.step_seconds
    assert math.fsum(outcome.warmup_step_seconds) < estimate, "the warm-up's steps have three micro-steps"
    assert outcome.samples_per_second == pytest.approx(2 * GAS / estimate)
    assert outcome.forward_seconds + outcome.backward_seconds == pytest.approx(estimate, rel=0.5)
    assert outcome.optimizer_seconds == 0.0
    # What it took is what its micro-steps took: those used are half of those run, behind the first two.
    assert outcome.from_micro_steps < GAS / 4
    return outcome


def test_each_stage_is_given_up_within_its_first_step_and_the_ranks_go_on(
    study: Callable[..., tuple[list[Outcome], list[str]]],
    started_ranks: Callable[[], list[psutil.Process]],
    tmp_path: Path,
) -> None:
    *given_up, short, whole = [config(stage) for stage in (3, 0, 2, 1, 3)] + [config(2, gas=2), config(3, gas=3)]
    outcomes, notices = study(*given_up, short, whole)
    assert notices == [], "the ranks were replaced"
    for each, outcome in zip(given_up, outcomes, strict=False):
        stopped(outcome, each.zero_stage)
    for outcome in outcomes[5:]:  # too few micro-steps to judge by: whole steps were timed
        assert isinstance(outcome, Measurement)
        assert (outcome.from_micro_steps, len(outcome.step_seconds)) == (0, 2)
    ranks = [json.loads((tmp_path / given_up[0].name / "ranks" / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["from_micro_steps"] == ranks[1]["from_micro_steps"]
    assert len(started_ranks()) == 2


def test_nothing_is_left_of_an_engine_that_was_stopped_within_a_step(
    study: Callable[..., tuple[list[Outcome], list[str]]],
) -> None:
    outcomes, notices = study(*[config(3)] * 8)
    peaks = [stopped(outcome, 3).peak_memory_bytes for outcome in outcomes]
    assert notices == []
    assert peaks[-1] - peaks[1] < 64 * MIB


def test_what_is_not_that_slow_is_timed(
    study: Callable[..., tuple[list[Outcome], list[str]]],
) -> None:
    outcomes, _ = study(config(1, gas=20), best=1.0)
    [outcome] = outcomes
    assert isinstance(outcome, Measurement)
    assert not outcome.stopped_early
    assert (outcome.from_micro_steps, len(outcome.step_seconds)) == (0, 2)
