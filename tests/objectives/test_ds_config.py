"""The DeepSpeed configuration of a trial: the user's settings, the trial's own, and defaults."""

import copy
from typing import Any

from ds_tune.objectives.ds_config import deepspeed_config
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
