"""What is counted of scripts whose samples differ in length, run for real on two CPU ranks."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_tune.objectives.running.deepspeed_objective import DeepSpeedObjective
from ds_tune.objectives.running.launch_line import read_launch_line
from ds_tune.objectives.trial import Failure, Measurement, TrialConfig
from ds_tune.objectives.workload.script import ScriptWorkload
from ds_tune.objectives.workload.script_facts import ScriptFacts

Objective = Callable[[ScriptWorkload], DeepSpeedObjective]

UNEVEN = ["uneven_loop.py", "--deepspeed_config", "ds_cpu.json"]
TRAINER = [
    "uneven_trainer.py", "--deepspeed", "ds_auto.json", "--output_dir", "out", "--per_device_train_batch_size", "2",
    "--gradient_accumulation_steps", "2",
]  # fmt: skip
PACKED = [
    "sft.py", "--deepspeed", "ds_auto.json", "--output_dir", "out", "--per_device_train_batch_size", "2",
    "--gradient_accumulation_steps", "2", "--max_length", "64", "--packing", "--bf16", "false",
]  # fmt: skip


def learned(line: list[str], objective: Objective, logs: Path) -> ScriptWorkload:
    start, _ = read_launch_line(line)
    facts = objective(ScriptWorkload(start=start)).learn(logs)
    assert isinstance(facts, ScriptFacts), facts
    return ScriptWorkload(start=start, facts=facts)


def known(line: list[str]) -> ScriptWorkload:
    """A script that has been learned before."""
    start, _ = read_launch_line(line)
    facts = ScriptFacts(
        loop="DeepSpeed", ds_config=json.loads(Path("ds_cpu.json").read_text()), zero_stage=1, micro_batch_size=2,
        gradient_accumulation_steps=4, dtype="fp32", parameters=1, trainable_parameters=1, model=None,
        samples_per_micro_batch=2, tokens_per_sample=None, loader_follows=False, micro_batch_flag="--batch_size",
        mean_tokens_per_sample=25.5,
    )  # fmt: skip
    return ScriptWorkload(start=start, facts=facts)


def timed(workload: ScriptWorkload, objective: Objective, logs: Path, *, mbs: int, gas: int) -> Measurement:
    config = TrialConfig(zero_stage=workload.known.zero_stage, micro_batch_size=mbs, gradient_accumulation_steps=gas)
    measured = objective(workload).run(config, logs, lambda phase: None)
    assert isinstance(measured, Measurement), measured
    assert len(measured.step_seconds) == 2
    return measured


def test_tokens_are_counted_where_samples_differ_in_length(objective: Objective, folder: Path, logs: Path) -> None:
    workload = learned(UNEVEN, objective, logs)
    facts = workload.known
    # 32 samples of 8, 13, … 43 tokens; of rank 0 in micro-batches as long as 18 and 38, of rank 1 as 23 and 43.
    assert (facts.mean_tokens_per_sample, facts.shortest_sample, facts.longest_sample) == (25.5, 8, 43)
    assert facts.padding_share == pytest.approx(40 / 244)
    assert (facts.tokens_per_sample, facts.samples_per_micro_batch, facts.is_packed) == (None, 2, False)
    assert workload.counting == (
        "26 tokens a sample (8–43 seen), 16% of what is computed is padding; tokens, padding apart, are what is counted"
    )
    measured = timed(workload, objective, logs, mbs=1, gas=2)
    assert measured.tokens_per_second == pytest.approx(25.5 * measured.samples_per_second)


def test_samples_are_counted_where_padding_cannot_be_told(objective: Objective, folder: Path, logs: Path) -> None:
    workload = learned([*UNEVEN, "--no-mask"], objective, logs)
    assert (workload.counted_tokens_per_sample, workload.tokens_per_sample, workload.counting) == (None, None, "")


def test_trial_ends_where_data_is_begun_anew_in_each_step(objective: Objective, folder: Path, logs: Path) -> None:
    workload = known([*UNEVEN, "--samples", "16", "--epochs", "50"])
    timed(workload, objective, logs, mbs=2, gas=4)


def test_trial_goes_by_tokens_where_lengths_fall_from_step_to_step(
    objective: Objective, folder: Path, logs: Path
) -> None:
    workload = learned([*TRAINER, "--train_sampling_strategy", "group_by_length"], objective, logs)
    facts = workload.known
    assert (facts.lengths_differ, facts.longest_sample) == (True, 47)
    assert facts.mean_tokens_per_sample is not None and facts.mean_tokens_per_sample > 40  # of all samples: 27
    measured = timed(workload, objective, logs, mbs=4, gas=1)
    assert measured.tokens_per_second == pytest.approx(facts.mean_tokens_per_sample * measured.samples_per_second)


def test_streamed_samples_are_counted_by_their_tokens(objective: Objective, folder: Path, logs: Path) -> None:
    line = [*TRAINER, "--streaming", "--accelerator_config", '{"dispatch_batches": false}']
    facts = learned(line, objective, logs).known
    assert (facts.mean_tokens_per_sample, facts.shortest_sample, facts.longest_sample) == (25.5, 8, 45)


def test_packed_samples_are_counted_by_their_tokens_and_their_batch_follows(
    objective: Objective, folder: Path, logs: Path
) -> None:
    workload = learned(PACKED, objective, logs)
    facts = workload.known
    assert (facts.is_packed, facts.samples_per_micro_batch, facts.micro_batch_size) == (True, 2, 2)
    assert (facts.mean_tokens_per_sample, facts.padding_share, facts.tokens_per_sample) == (64.0, 0.0, None)
    assert workload.counting.startswith("64 tokens a sample (packed into one row), no padding; ")
    measured = timed(workload, objective, logs, mbs=4, gas=1)
    assert measured.tokens_per_second == pytest.approx(64 * measured.samples_per_second)


def test_batch_of_packed_samples_that_does_not_follow_is_found_out(
    objective: Objective, folder: Path, logs: Path
) -> None:
    workload = known(["flattened.py", "--samples_at_once", "2", "--deepspeed_config", "ds_cpu.json"])
    config = TrialConfig(zero_stage=1, micro_batch_size=4, gradient_accumulation_steps=1)
    failure = objective(workload).run(config, logs, lambda phase: None)
    assert isinstance(failure, Failure)
    assert "its batch is 2 where 4 was asked for" in failure.message
