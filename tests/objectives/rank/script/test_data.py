"""Data of scripts that ends before a trial does, run for real on two CPU ranks."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from ds_tune.objectives.numerics import LossCurve
from ds_tune.objectives.running.deepspeed_objective import DeepSpeedObjective
from ds_tune.objectives.running.launch_line import read_launch_line
from ds_tune.objectives.trial import Failure, Measurement, TrialConfig
from ds_tune.objectives.workload.script import ScriptWorkload
from ds_tune.objectives.workload.script_facts import ScriptFacts

Objective = Callable[[ScriptWorkload], DeepSpeedObjective]
CONFIG = TrialConfig(zero_stage=1, micro_batch_size=2, gradient_accumulation_steps=1)


def learned(objective: Objective, logs: Path, *line: str) -> ScriptWorkload:
    """A script whose first run is over."""
    start, _ = read_launch_line(line)
    facts = objective(ScriptWorkload(start=start)).learn(logs)
    assert isinstance(facts, ScriptFacts), facts
    return ScriptWorkload(start=start, facts=facts)


def timed(objective: Objective, workload: ScriptWorkload, logs: Path, accumulation: int) -> Measurement | Failure:
    """A trial of a dozen whole steps."""
    train = objective(workload)
    train.plan = dataclasses.replace(train.plan, min_timed_steps=12, max_timed_steps=12)
    return train.run(dataclasses.replace(CONFIG, gradient_accumulation_steps=accumulation), logs, ignore)


def ignore(phase: str) -> None:
    pass


def test_data_of_a_loop_begins_again_where_it_ends_and_that_is_said(
    objective: Objective, folder: Path, logs: Path, notices: list[str]
) -> None:
    # 11 samples a rank: the last batch of each pass is smaller.
    line = ["own_loop.py", "--deepspeed_config", "ds_cpu.json", "--samples", "22", "--epochs", "1"]
    workload = learned(objective, logs, *line)
    assert isinstance(measured := timed(objective, workload, logs, 4), Measurement), measured
    assert notices == ["Its data ends after 1 step and is begun again in trials."]
    curve = objective(workload).losses(dataclasses.replace(CONFIG, gradient_accumulation_steps=4), logs, ignore)
    assert isinstance(curve, LossCurve), curve
    # 7 samples a rank, in four micro-batches of two: no step has all of its own.
    shorter = dataclasses.replace(workload, start=workload.start.with_option("--samples", "14"))
    failure = timed(objective, shorter, logs, 4)
    assert isinstance(failure, Failure)
    assert "hardly any optimizer step has its whole batch" in failure.message


def test_data_of_accelerate_begins_again_without_a_step_that_is_not_whole(
    objective: Objective, folder: Path, logs: Path, notices: list[str]
) -> None:
    workload = learned(objective, logs, "accelerate_loop.py", "--samples", "26", "--gradient_accumulation_steps", "2")
    assert isinstance(measured := timed(objective, workload, logs, 4), Measurement), measured
    assert notices == ["Its data ends after 1 step and is begun again in trials."]
    refused = objective(workload).run(
        dataclasses.replace(CONFIG, zero_stage=2, gradient_accumulation_steps=4), logs, ignore
    )
    assert isinstance(refused, Failure)
    assert refused.raised == "AssertionError in no_sync, accelerate_loop.py:29"


def test_trainer_begins_again_by_itself_and_its_steps_at_the_end_of_its_data_are_left_out(
    objective: Objective, folder: Path, logs: Path, notices: list[str]
) -> None:
    line = ["trainer.py", "--deepspeed", "ds_auto.json", "--per_device_train_batch_size", "2", "--samples", "22"]
    workload = learned(objective, logs, *line)
    # 6 micro-steps a pass: every other step has only two of them.
    assert isinstance(measured := timed(objective, workload, logs, 4), Measurement), measured
    failure = timed(objective, workload, logs, 8)  # where every step has six
    assert isinstance(failure, Failure)
    assert "hardly any optimizer step has its whole batch" in failure.message
    assert notices == []


def test_stream_with_workers_begins_again_and_what_it_evaluates_on_does_not(
    objective: Objective, folder: Path, logs: Path, notices: list[str]
) -> None:
    workload = learned(objective, logs, "stream.py", "--deepspeed_config", "ds_cpu.json")
    assert isinstance(measured := timed(objective, workload, logs, 2), Measurement), measured
    # 21 samples, of which one worker has 11 and the other one 10: 11 batches.
    assert notices == ["Its data ends after 5 steps and is begun again in trials."]
    said = (logs / "stdout.log").read_text()
    assert said.index("before") < said.index("between") < said.index("step 13 2")
    assert "trained" not in said
    # A script that ends by a count of its own does.
    counting = dataclasses.replace(workload, start=workload.start.with_option("--max-steps", "7"))
    failure = timed(objective, counting, logs, 2)
    assert isinstance(failure, Failure)
    assert "it ended after 7 optimizer steps, too few to time" in failure.message
