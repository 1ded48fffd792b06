"""Scripts as people write them, run for real on two CPU ranks: what is learned, what reaches them, what is left."""

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ds_tune.objectives.numerics import LossCurve
from ds_tune.objectives.running.deepspeed_objective import DeepSpeedObjective
from ds_tune.objectives.running.launch_line import read_launch_line
from ds_tune.objectives.trial import Failure, Measurement, TrialConfig
from ds_tune.objectives.workload.script import ScriptWorkload
from ds_tune.objectives.workload.script_facts import ScriptFacts

Objective = Callable[[ScriptWorkload], DeepSpeedObjective]


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def ignore(phase: str) -> None:
    pass


LINES = {
    "plain, file": ["own_loop.py", "--deepspeed_config", "ds_cpu.json"],
    "plain, dict": ["dict_config.py"],
    "Trainer": [
        "trainer.py", "--deepspeed", "ds_auto.json", "--per_device_train_batch_size", "2", "--output_dir", "out",
        "--gradient_accumulation_steps", "4", "--max_steps", "3", "--eval_on_start", "--eval_strategy", "steps",
        "--eval_steps", "1", "--save_steps", "1", "--report_to", "none",
    ],
    "Trainer in code": ["in_code.py"],
    "trl": [
        "sft.py", "--deepspeed", "ds_auto.json", "--output_dir", "out", "--per_device_train_batch_size", "2",
        "--gradient_accumulation_steps", "2", "--max_length", "32", "--bf16", "false",
    ],
    "Accelerate": ["accelerate_loop.py", "--gradient_accumulation_steps", "4"],
}  # fmt: skip

LEARNED = {
    "plain, file": ("DeepSpeed", 1, 2, 4, None, "own_loop.py:26", "--batch-size", None),
    "plain, dict": ("DeepSpeed", 1, 4, 2, None, "dict_config.py:17", None, None),
    "Trainer": (
        "Trainer", 2, 2, 4, 32, "trainer.py:24", "--per_device_train_batch_size", "--gradient_accumulation_steps",
    ),
    "Trainer in code": ("Trainer", 1, 2, 2, 32, "in_code.py:31", None, None),
    "trl": (
        "Trainer", 2, 2, 2, 32, "sft.py:22", "--per_device_train_batch_size", "--gradient_accumulation_steps",
    ),
    "Accelerate": (
        "Accelerate", 1, 2, 4, 32, "accelerate_loop.py:25", "--per_device_train_batch_size",
        "--gradient_accumulation_steps",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LINES)
def test_script_is_learned_timed_with_other_settings_and_compared_by_its_losses(
    kind: str, objective: Objective, folder: Path, logs: Path
) -> None:
    before = hashes(folder)
    start, _ = read_launch_line(LINES[kind])
    facts = objective(ScriptWorkload(start=start)).learn(logs)
    assert isinstance(facts, ScriptFacts), facts
    assert LEARNED[kind] == (
        facts.loop, facts.zero_stage, facts.micro_batch_size, facts.gradient_accumulation_steps,
        facts.tokens_per_sample, facts.initialized_at, facts.micro_batch_flag, facts.accumulation_flag,
    )  # fmt: skip
    assert facts.dtype == "fp32"
    assert facts.parameters >= facts.trainable_parameters > 0
    assert (facts.parameters > 10 * facts.trainable_parameters) == (kind == "Trainer in code")  # LoRA
    assert (facts.model is not None) == (facts.tokens_per_sample is not None)
    workload = ScriptWorkload(start=start, facts=facts)
    assert workload.batch_follows
    train = objective(workload)
    # The rank itself checks that stage, sizes and batches are those of the trial.
    other = TrialConfig(
        # Accelerate's `accumulate` is refused where DeepSpeed partitions gradients.
        zero_stage=0 if kind == "Accelerate" else 3 - facts.zero_stage,
        micro_batch_size=2 * facts.micro_batch_size,
        gradient_accumulation_steps=facts.gradient_accumulation_steps // 2,
    )
    measured = train.run(other, logs, ignore)
    assert isinstance(measured, Measurement), measured
    assert len(measured.step_seconds) == 2
    assert measured.model_parameters == facts.parameters
    assert (measured.flops_per_sample > 0) == (workload.model_document() is not None)
    own = TrialConfig(
        zero_stage=facts.zero_stage,
        micro_batch_size=facts.micro_batch_size,
        gradient_accumulation_steps=facts.gradient_accumulation_steps,
    )
    curves = [train.losses(config, logs, ignore) for config in (own, other)]
    assert not any(isinstance(curve, Failure) for curve in curves), curves
    if kind != "plain, dict":  # whose loader deals the data out in another order for another size
        first, second = (curve.losses[0] for curve in curves if not isinstance(curve, Failure))
        assert math.isclose(first, second, rel_tol=1e-5)
    assert hashes(folder) == before


def test_nothing_is_saved_printed_after_the_end_or_left_running(objective: Objective, folder: Path, logs: Path) -> None:
    before = hashes(folder)
    start, _ = read_launch_line(["saves_often.py", "ds_cpu.json"])
    facts = objective(ScriptWorkload(start=start)).learn(logs)
    assert isinstance(facts, ScriptFacts), facts
    train = objective(ScriptWorkload(start=start, facts=facts))
    config = TrialConfig(zero_stage=1, micro_batch_size=2, gradient_accumulation_steps=4)
    assert isinstance(train.run(config, logs, ignore), Measurement)
    assert hashes(folder) == before
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and sleeping(folder):
        time.sleep(0.1)
    assert not sleeping(folder)


def sleeping(folder: Path) -> list[psutil.Process]:
    """Children that the script has left in its folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.name() == "sleep" and Path(process.cwd()) == folder:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (["never_deepspeed.py"], "it never calls deepspeed.initialize with a model to train"),
        (["two_engines.py", "--ask"], "it waits for input, and in a trial nobody types"),
        (["own_loop.py"], "DeepSpeed requires --deepspeed_config"),
    ],
)
def test_script_that_does_not_train_says_why(
    line: list[str], sentence: str, objective: Objective, folder: Path, logs: Path
) -> None:
    start, _ = read_launch_line(line)
    failure = objective(ScriptWorkload(start=start)).learn(logs)
    assert isinstance(failure, Failure)
    assert sentence in failure.message


def test_an_option_that_the_script_lacks_is_refused_in_the_first_run(
    objective: Objective, folder: Path, logs: Path
) -> None:
    start, _ = read_launch_line(LINES["plain, file"])
    mapped = {"train_micro_batch_size_per_gpu": "--rows"}
    failure = objective(ScriptWorkload(start=start, mapped=mapped)).learn(logs)
    assert isinstance(failure, Failure)
    assert "`map` names --rows, which is no option of it" in failure.message


def test_of_two_engines_the_one_that_trains_is_meant(objective: Objective, folder: Path, logs: Path) -> None:
    start, _ = read_launch_line(["two_engines.py"])
    facts = objective(ScriptWorkload(start=start)).learn(logs)
    assert isinstance(facts, ScriptFacts), facts
    assert (facts.engines, facts.zero_stage, facts.initialized_at) == (2, 1, "two_engines.py:15")


def test_a_trial_that_ends_too_early_says_after_how_many_steps(objective: Objective, folder: Path, logs: Path) -> None:
    start, _ = read_launch_line(["short.py"])
    facts = objective(ScriptWorkload(start=start)).learn(logs)
    assert isinstance(facts, ScriptFacts), facts
    config = TrialConfig(zero_stage=1, micro_batch_size=2, gradient_accumulation_steps=1)
    train = objective(ScriptWorkload(start=start, facts=facts))
    train.plan = dataclasses.replace(train.plan, min_timed_steps=4, max_timed_steps=4)
    failure = train.run(config, logs, ignore)
    assert isinstance(failure, Failure)
    assert "it ended after 3 optimizer steps, too few to time" in failure.message


def test_a_batch_that_does_not_follow_is_found_out(objective: Objective, folder: Path, logs: Path) -> None:
    start, _ = read_launch_line(["short.py"])
    facts = objective(ScriptWorkload(start=start)).learn(logs)
    assert isinstance(facts, ScriptFacts), facts
    workload = ScriptWorkload(start=start, facts=facts)
    assert not workload.batch_follows
    failure = objective(workload).run(
        TrialConfig(zero_stage=1, micro_batch_size=4, gradient_accumulation_steps=1), logs, ignore
    )
    assert isinstance(failure, Failure)
    assert "its batch is 2 where 4 was asked for" in failure.message


def test_knobs_are_laid_on_a_script_s_model_and_keep_its_numbers(
    objective: Objective, folder: Path, logs: Path
) -> None:
    start, _ = read_launch_line(LINES["Trainer"])
    facts = objective(ScriptWorkload(start=start)).learn(logs)
    assert isinstance(facts, ScriptFacts), facts
    assert facts.model_knobs == (
        "activation_checkpointing", "compile", "padded_vocabulary", "loss_computation", "attention",
    )  # fmt: skip
    workload = ScriptWorkload(start=start, facts=facts)
    train = objective(workload)
    own = TrialConfig(zero_stage=2, micro_batch_size=2, gradient_accumulation_steps=4)
    knobs = {"activation_checkpointing": 1, "padded_vocabulary": 96, "loss_computation": "chunked"}
    laid = TrialConfig.from_json({**own.to_json(), **knobs, "attention": "eager"})
    assert isinstance(train.run(laid, logs, ignore), Measurement)
    plain, other = (train.losses(config, logs, ignore) for config in (own, laid))
    assert isinstance(plain, LossCurve)
    assert isinstance(other, LossCurve), other
    assert other.losses == pytest.approx(plain.losses, rel=1e-5)
    # The last micro-batches of an epoch have other targets than the others: the Trainer weighs by their number.
    assert len(set(plain.losses)) == len(plain.losses)


def test_checkpointing_that_a_script_has_on_is_its_own_and_can_be_switched_off(
    objective: Objective, folder: Path, logs: Path
) -> None:
    start, _ = read_launch_line(LINES["Trainer in code"])
    facts = objective(ScriptWorkload(start=start)).learn(logs)
    assert isinstance(facts, ScriptFacts), facts
    workload = ScriptWorkload(start=start, facts=facts)
    assert workload.own_knobs == {"activation_checkpointing": 1}
    assert "loss_computation" not in facts.model_knobs  # of the model within peft's, which has no loss of its own
    core = {"zero_stage": 1, "micro_batch_size": 2, "gradient_accumulation_steps": 2}
    on, off = (TrialConfig.from_json({**core, "activation_checkpointing": value}) for value in (1, 0))
    assert workload.laid_on(on) == {}
    assert workload.laid_on(off) == {"activation_checkpointing": 0}
    plain, other = (objective(workload).losses(config, logs, ignore) for config in (on, off))
    assert isinstance(plain, LossCurve)
    assert isinstance(other, LossCurve), other
    assert other.losses == pytest.approx(plain.losses, rel=1e-5)
