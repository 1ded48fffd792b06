"""The DeepSpeed configuration of a trial: the user's settings, the trial's own, and defaults."""

import copy
import dataclasses
from typing import Any

import pytest
import transformers

from ds_tune.objectives.ds_config import deepspeed_config
from ds_tune.objectives.ds_document import knobs_of, precision_of, switched_off
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

CONFIG = TrialConfig(zero_stage=2, micro_batch_size=4, gradient_accumulation_steps=3)


def made(base: dict[str, Any] | None = None, *, dtype: str = "bf16", device: str = "cuda") -> dict[str, Any]:
    workload = HuggingFaceWorkload(model="gpt2-nano", seq_len=32, dtype=dtype, base_ds_config=base or {})
    return deepspeed_config(CONFIG, workload, ranks=2, device=device)


def test_batch_sizes_and_stage_are_the_trial_s() -> None:
    document = made({"train_batch_size": 7, "train_micro_batch_size_per_gpu": 7, "zero_optimization": {"stage": 3}})
    assert document["train_micro_batch_size_per_gpu"] == 4
    assert document["gradient_accumulation_steps"] == 3
    assert document["train_batch_size"] == 24
    assert document["zero_optimization"]["stage"] == 2


def test_everything_else_is_the_user_s() -> None:
    base = {
        "optimizer": {"type": "Lamb", "params": {"lr": 1.0}},
        "gradient_clipping": 0.5,
        "zero_optimization": {"overlap_comm": True},
        "wall_clock_breakdown": True,
    }
    document = made(base)
    assert document["optimizer"] == base["optimizer"]
    assert document["gradient_clipping"] == 0.5
    assert document["zero_optimization"] == {"overlap_comm": True, "stage": 2}
    assert "wall_clock_breakdown" not in document


def test_optimizer_and_gradient_clipping_have_defaults() -> None:
    document = made()
    assert document["optimizer"]["type"] == "AdamW"
    assert document["gradient_clipping"] == 1.0


def test_the_precision_is_the_workload_s_and_the_user_s_loss_scaling_stays() -> None:
    base = {"bf16": {"enabled": True}, "fp16": {"enabled": False, "initial_scale_power": 12}}
    document = made(base, dtype="fp16")
    assert document["fp16"] == {"enabled": True, "initial_scale_power": 12}
    assert "bf16" not in document
    assert not {"fp16", "bf16"} & set(made(base, dtype="fp32"))


def test_auto_as_the_trainer_knows_it_is_left_out() -> None:
    base = {"gradient_clipping": "auto", "optimizer": {"type": "AdamW", "params": {"lr": 1.0, "betas": "auto"}}}
    document = made(base)
    assert document["gradient_clipping"] == 1.0
    assert document["optimizer"]["params"] == {"lr": 1.0}


def test_deepspeed_s_own_autotuner_is_kept_out() -> None:
    assert "autotuning" not in made({"autotuning": {"enabled": True}})


def test_cpu_ranks_get_torch_s_adam_and_small_buckets() -> None:
    document = made(device="cpu")
    assert document["optimizer"]["params"]["torch_adam"] is True
    assert document["zero_optimization"]["reduce_bucket_size"] == 5_000_000
    gpu = made(device="cuda")
    assert "torch_adam" not in gpu["optimizer"]["params"]
    assert "reduce_bucket_size" not in gpu["zero_optimization"]


def test_the_user_s_document_is_not_changed() -> None:
    base = {"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}, "zero_optimization": {"stage": 0}, "fp16": {}}
    before = copy.deepcopy(base)
    made(base, device="cpu")
    assert base == before


def exported(base: dict[str, Any]) -> dict[str, Any]:
    workload = HuggingFaceWorkload(model="gpt2-nano", seq_len=32, dtype="bf16", base_ds_config=base)
    return deepspeed_config(CONFIG, workload, ranks=2, device="cuda", exported=True)


QUIET = {
    "tensorboard": {"enabled": True},
    "wandb": {"enabled": True, "project": "p"},
    "csv_monitor": {"enabled": True},
    "comet": {"enabled": True},
    "wall_clock_breakdown": True,
    "memory_breakdown": True,
    "dump_state": True,
    "flops_profiler": {"enabled": True, "profile_step": 3},
    "comms_logger": {"enabled": True},
}


@pytest.mark.parametrize("key", QUIET)
def test_monitors_and_debugging_are_off_in_trials_and_kept_in_the_export(key: str) -> None:
    assert key in switched_off(QUIET)
    assert key not in made(QUIET)
    assert exported(QUIET)[key] == QUIET[key]


def test_printing_and_checks_are_off_in_trials_and_kept_in_the_export() -> None:
    base = {"steps_per_print": 10, "zero_optimization": {"enable_sanity_checks": True, "overlap_comm": True}}
    assert switched_off(base) == ["steps_per_print", "zero_optimization.enable_sanity_checks"]
    assert made(base)["steps_per_print"] > 1_000_000
    assert made(base)["zero_optimization"] == {"overlap_comm": True, "stage": 2}
    assert exported(base)["steps_per_print"] == 10
    assert exported(base)["zero_optimization"]["enable_sanity_checks"] is True


def test_what_is_off_already_is_not_said_to_be_switched_off() -> None:
    assert switched_off({"wandb": {"enabled": False}, "wall_clock_breakdown": False, "comms_logger": {}}) == []


@pytest.mark.parametrize("name", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest"])
def test_scheduler_with_auto_is_left_out_and_one_of_numbers_is_kept(name: str) -> None:
    scheduler = {"type": name, "params": {"total_num_steps": "auto", "warmup_min_lr": 0}}
    assert "scheduler" not in made({"scheduler": scheduler})
    assert "scheduler" not in made({"scheduler": "auto"})
    whole = {"type": name, "params": {"warmup_min_lr": 0}}
    assert made({"scheduler": whole})["scheduler"] == whole


@pytest.mark.parametrize("params", ["auto", {"lr": "auto", "betas": "auto"}])
def test_learning_rate_that_is_auto_is_the_trainer_s_default(params: Any) -> None:
    document = made({"optimizer": {"type": "AdamW", "params": params}})
    assert document["optimizer"]["params"] == {"lr": transformers.TrainingArguments(output_dir="x").learning_rate}


OFFLOADED = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}}}


@pytest.mark.parametrize("zero", [OFFLOADED["zero_optimization"], {"stage": 2, "cpu_offload": True}], ids=str)
def test_offload_of_the_file_is_a_knob_that_a_trial_can_switch_off(zero: dict[str, Any]) -> None:
    base = {"zero_optimization": zero}
    assert knobs_of(base, zero_stage=2) == {"offload_optimizer": "cpu"}
    assert made(base)["zero_optimization"] == {"stage": 2}
    workload = HuggingFaceWorkload(model="gpt2-nano", seq_len=32, dtype="bf16", base_ds_config=base)
    own = dataclasses.replace(CONFIG, offload_optimizer="cpu")
    assert deepspeed_config(own, workload, ranks=2, device="cuda")["zero_optimization"] == zero
    assert deepspeed_config(CONFIG, workload, ranks=2, device="cpu")["zero_optimization"].items() >= zero.items()


@pytest.mark.parametrize(
    ("zero", "stage", "knobs"),
    [
        ({"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}, 3,
         {"offload_optimizer": "cpu", "offload_parameters": "cpu"}),
        ({"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}, 1, {"offload_optimizer": "cpu"}),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, 3, {"offload_optimizer": "cpu_half"}),
        ({"offload_optimizer": {"device": "cpu"}}, 0, {}),
        ({"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, 3, {}),
        ({"offload_optimizer": {"device": "none"}, "offload_param": None}, 3, {}),
        (True, 1, {}),
        ("auto", 1, {}),
    ],
)  # fmt: skip
def test_knobs_of_a_document_are_its_offloads_to_the_host(zero: Any, stage: int, knobs: dict[str, str]) -> None:
    assert knobs_of({"zero_optimization": zero}, zero_stage=stage) == knobs


def test_offload_to_a_disk_stays_in_every_trial() -> None:
    zero = {"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}
    assert made({"zero_optimization": zero})["zero_optimization"] == {**zero, "stage": 2}


def test_torch_s_adam_on_a_cpu_is_given_what_it_takes() -> None:
    base = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "bias_correction": True, "set_grad_none": True}}}
    assert made(base, device="cpu")["optimizer"]["params"] == {"lr": 1e-5, "torch_adam": True}
    assert made(base, device="cuda")["optimizer"] == base["optimizer"]


def test_adam_without_bias_correction_is_deepspeed_s_own_on_a_cpu_too() -> None:
    base = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "bias_correction": False}}}
    assert made(base, device="cpu")["optimizer"] == base["optimizer"]


@pytest.mark.parametrize(
    ("document", "precision"),
    [
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, "fp16"),
        ({"fp16": {"enabled": False}, "bf16": {"enabled": False}}, "fp32"),
        ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}, None),
        ({"fp16": {"enabled": False}, "bf16": "auto"}, None),
        ({"fp16": {"enabled": False}}, None),
        ({}, None),
    ],
)
def test_precision_of_a_document_is_what_it_enables(document: dict[str, Any], precision: str | None) -> None:
    assert precision_of(document) == precision
