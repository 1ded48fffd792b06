"""A training script as plain values: where its settings are, and how it is launched with others."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ds_tune.objectives.ds_config import deepspeed_config
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.script import ScriptStart, ScriptWorkload
from ds_tune.objectives.workload.script_facts import ACCELERATE, PLAIN, TRAINER, ScriptFacts

CONFIG = TrialConfig(zero_stage=2, micro_batch_size=8, gradient_accumulation_steps=1)
AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    "zero_optimization": {"stage": 1, "overlap_comm": True},
    "autotuning": {"enabled": True},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    (tmp_path / "model.json").write_text(json.dumps({"model_type": "gpt2"}))
    return tmp_path


def workload(folder: Path, *arguments: str, loop: str = PLAIN, **facts: Any) -> ScriptWorkload:
    start = ScriptStart(
        program=str(folder / "train.py"), is_module=False, arguments=arguments, local_rank_flag=None, environment={},
        folder=str(folder), launcher=(),
    )  # fmt: skip
    known = {
        "ds_config": {}, "zero_stage": 1, "micro_batch_size": 2, "gradient_accumulation_steps": 4, "dtype": "bf16",
        "parameters": 100, "trainable_parameters": 100, "model": {"model_type": "gpt2"}, "samples_per_micro_batch": 2,
        "tokens_per_sample": 32, "loader_follows": False, **facts,
    }  # fmt: skip
    return ScriptWorkload(start=start, facts=ScriptFacts(loop=loop, **known))


@pytest.mark.parametrize("arguments", [("--config", "model.json", "--ds", "ds.json"), ("--ds=ds.json",)])
def test_deepspeed_file_is_found_among_the_arguments_and_replaced(arguments: tuple[str, ...], folder: Path) -> None:
    start = workload(folder, *arguments).started_with(Path("/tmp/other.json"), CONFIG)
    assert start.arguments[-1].rpartition("=")[2] == "/tmp/other.json"
    assert start.arguments[:-1] == arguments[:-1]


def test_a_file_that_is_no_deepspeed_configuration_stays(folder: Path) -> None:
    script = workload(folder, "--config", "model.json", "--data", "missing.json")
    assert script.started_with(Path("/tmp/other.json"), CONFIG) == script.start


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--bs", "2", "x"), ("--bs", "8", "x")),
        (("--bs=2",), ("--bs=8",)),
        (("x",), ("x", "--bs", "8")),
    ],
)
def test_option_of_the_batch_size_is_set_where_it_stands_or_added(
    arguments: tuple[str, ...], expected: tuple[str, ...], folder: Path
) -> None:
    script = workload(folder, *arguments, micro_batch_flag="--bs")
    assert script.started_with(None, CONFIG).arguments == expected


def test_option_named_by_the_person_goes_before_the_one_that_was_found(folder: Path) -> None:
    mapped = {"train_micro_batch_size_per_gpu": "--rows", "zero_optimization.stage": "--zero"}
    script = dataclasses.replace(workload(folder, micro_batch_flag="--bs"), mapped=mapped)
    assert script.flags == {"micro_batch_size": "--rows", "zero_stage": "--zero"}
    assert script.started_with(None, CONFIG).arguments == ("--rows", "8", "--zero", "2")


def test_batch_size_follows_by_option_file_loader_or_trainer(folder: Path) -> None:
    assert not workload(folder).batch_follows
    assert not workload(folder, "ds.json", loop=ACCELERATE).batch_follows
    assert workload(folder, "ds.json").batch_follows
    assert workload(folder, loader_follows=True).batch_follows
    assert workload(folder, micro_batch_flag="--bs").batch_follows
    assert workload(folder, loop=TRAINER).batch_follows


def test_trainer_keeps_its_auto_values_and_others_get_numbers(folder: Path) -> None:
    kept = deepspeed_config(CONFIG, workload(folder, loop=TRAINER, ds_config=AUTO), ranks=2, device="cuda")
    assert kept == {
        key: value if key != "zero_optimization" else {"stage": 2, "overlap_comm": True}
        for key, value in AUTO.items()
        if key != "autotuning"
    }
    laid = deepspeed_config(CONFIG, workload(folder, ds_config=AUTO), ranks=2, device="cuda")
    assert (laid["train_micro_batch_size_per_gpu"], laid["train_batch_size"]) == (8, 16)
    assert AUTO["zero_optimization"] == {"stage": 1, "overlap_comm": True}


def test_concrete_batch_sizes_of_a_trainer_s_file_follow(folder: Path) -> None:
    written = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": "auto"}
    laid = deepspeed_config(CONFIG, workload(folder, loop=TRAINER, ds_config=written), ranks=2, device="cuda")
    assert laid["train_micro_batch_size_per_gpu"] == 8
    assert laid["gradient_accumulation_steps"] == "auto"
    assert "train_batch_size" not in laid


def test_nothing_of_ds_tune_s_own_is_added(folder: Path) -> None:
    assert set(deepspeed_config(CONFIG, workload(folder), ranks=2, device="cpu")) == {
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "zero_optimization",
    }  # fmt: skip


def test_launch_line_is_the_person_s_with_the_settings_in_it(folder: Path) -> None:
    script = workload(folder, "--ds", "ds.json", micro_batch_flag="--bs")
    start = dataclasses.replace(script.start, launcher=("deepspeed", "--num_gpus", "2"))
    own = dataclasses.replace(script, start=start)
    ending = [str(folder / "train.py"), "--ds", "best.json", "--bs", "8"]
    assert own.launch_line(["deepspeed"], 2, Path("best.json"), CONFIG) == ["deepspeed", "--num_gpus", "2", *ending]
    without = script.launch_line(["deepspeed"], 2, Path("best.json"), CONFIG)
    assert without == ["torchrun", "--standalone", "--nproc_per_node", "2", *ending]


def test_what_the_launch_line_cannot_say_is_said_to_be_written_by_hand(folder: Path) -> None:
    assert workload(folder, "ds.json").by_hand(CONFIG) == []
    [line] = workload(folder, initialized_at="train.py:7").by_hand(CONFIG)
    assert line == "Put ds_config_optimal.json in the place of the DeepSpeed settings that reach train.py:7."
    [line] = workload(folder, "ds.json", loop=TRAINER).by_hand(CONFIG)
    assert line == "Write TrainingArguments(per_device_train_batch_size=8, gradient_accumulation_steps=1)."


def test_partly_trained_model_says_how_many_of_its_parameters_are(folder: Path) -> None:
    script = workload(folder, trainable_parameters=3, adapter_inputs=1.5)
    assert script.model_document() == {"model_type": "gpt2"}
    counted = script.parameter_counts
    assert (counted.parameters, counted.trainable, counted.adapter_inputs) == (100, 3, 1.5)


def test_launch_line_lays_knobs_on_the_model_of_a_script_that_stays_as_it_is(folder: Path) -> None:
    script = workload(folder, "--ds", "ds.json", loop=TRAINER, model_knobs=("compile", "padded_vocabulary"))
    config = dataclasses.replace(CONFIG, compile="blocks", padded_vocabulary=64)
    module = "ds_tune.objectives.rank.script.with_knobs"
    knobs = ["--knob", "compile=blocks", "--knob", "padded_vocabulary=64"]
    words = script.launch_line((), 2, folder / "best.json", config)
    assert words[:5] == ["torchrun", "--standalone", "--nproc_per_node", "2", "-m"]
    assert words[5:] == [module, *knobs, str(folder / "train.py"), "--ds", str(folder / "best.json")]
    start = dataclasses.replace(script.start, launcher=("/bin/deepspeed", "--num_gpus", "2"))
    words = dataclasses.replace(script, start=start).launch_line((), 2, folder / "best.json", config)
    assert words[:5] == [*start.launcher, "--module", module]
    start = dataclasses.replace(start, launcher=(*start.launcher, "--module"), program="pkg.train", is_module=True)
    words = dataclasses.replace(script, start=start).launch_line((), 2, folder / "best.json", config)
    assert words[3:11] == ["--module", module, *knobs, "--module", "pkg.train"]
    assert module not in script.launch_line((), 2, folder / "best.json", CONFIG)


def test_what_a_launch_line_lays_on_can_be_had_in_the_script_s_own_code(folder: Path) -> None:
    config = dataclasses.replace(CONFIG, compile="blocks", activation_checkpointing=1)
    trainer, plain = (workload(folder, loop=loop, initialized_at="train.py:9") for loop in (TRAINER, PLAIN))
    assert trainer.in_code(CONFIG) == []
    assert trainer.in_code(config) == [
        "Activation checkpointing is the Trainer's gradient_checkpointing=True.",
        "Without ds-tune in the launch line: `from ds_tune.objectives import apply_knobs` and "
        "`apply_knobs(model, compile='blocks')` before the Trainer is made.",
    ]
    assert plain.in_code(config)[0].endswith(
        "`apply_knobs(model, activation_checkpointing=1, compile='blocks')` before train.py:9."
    )


def test_knobs_that_a_script_cannot_be_given_are_out_of_reach(folder: Path) -> None:
    knobs = ("activation_checkpointing", "compile")
    assert workload(folder, model_knobs=knobs, ds_config=AUTO).out_of_reach == {
        "padded_vocabulary", "loss_computation", "attention", "dropout", "vocabulary", "precision",
    }  # fmt: skip
    uneven = workload(folder, model_knobs=knobs, tokens_per_sample=None, ds_config={})
    assert uneven.out_of_reach > {"compile", "optimizer", "offload_optimizer"}


def test_facts_of_an_earlier_version_count_samples_and_are_said_in_tokens(folder: Path) -> None:
    earlier = workload(folder)
    assert (earlier.known.mean_tokens_per_sample, earlier.known.lengths_differ, earlier.counting) == (None, False, "")
    assert earlier.counted_tokens_per_sample == 32


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"shortest_sample": 32, "longest_sample": 32}, ""),
        (
            {"shortest_sample": 8, "longest_sample": 64, "padding_share": 0.236},
            "33 tokens a sample (8–64 seen), 24% of what is computed is padding; ",
        ),
        ({"is_packed": True}, "33 tokens a sample (packed into one row), no padding; "),
    ],
)
def test_what_is_counted_is_said_where_lengths_differ(facts: dict[str, Any], words: str, folder: Path) -> None:
    script = workload(folder, mean_tokens_per_sample=32.6, **facts)
    assert script.counting == (words and f"{words}tokens, padding apart, are what is counted")
    assert script.counted_tokens_per_sample == 32.6
