"""Knobs: their names, which are on, and how they get into DeepSpeed's configuration."""

from pathlib import Path

import pytest

from ds_tune.objectives.ds_config import deepspeed_config, dtype_of
from ds_tune.objectives.knobs import whole_number
from ds_tune.objectives.trial import KNOBS, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

PLAIN = {"zero_stage": 2, "micro_batch_size": 4, "gradient_accumulation_steps": 2}
WORKLOAD = HuggingFaceWorkload(model="gpt2-nano", seq_len=32, dtype="fp32")
PAGE = (Path(__file__).parents[2] / "docs" / "knobs.md").read_text()


def test_a_knob_that_is_off_leaves_name_and_document_as_they_were() -> None:
    config = TrialConfig(**PLAIN)
    assert config.name == "z2_gas2_tmbspg4"
    assert config.knobs_on == {} and config.to_json() == PLAIN


def test_knobs_that_are_on_stand_in_the_name_between_stage_and_batch_sizes() -> None:
    config = TrialConfig(**PLAIN, activation_checkpointing=1, compile="blocks", bucket_elements=50_000_000)
    assert config.name == "z2_ac1_compile-blocks_rbs5.0e+07_gas2_tmbspg4"
    assert config.model_knobs == {"activation_checkpointing": 1, "compile": "blocks"}
    assert TrialConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in KNOBS for value in KNOBS[field].values])
def test_every_value_is_documented_and_comes_back_from_json(field: str, value: int | str) -> None:
    config = TrialConfig(**PLAIN, **{field: value})
    assert TrialConfig.from_json(config.to_json()) == config
    [row] = [line for line in PAGE.splitlines() if line.startswith(f"| `{field}` |")]
    assert str(value) in row and f"`{KNOBS[field].label}" in row


def test_a_knob_is_laid_over_the_users_own_settings_and_keeps_the_rest() -> None:
    own = {"zero_optimization": {"overlap_comm": False, "reduce_bucket_size": 123, "sub_group_size": 7}}
    workload = HuggingFaceWorkload(model="gpt2-nano", seq_len=32, dtype="fp32", base_ds_config=own)
    config = TrialConfig(**PLAIN, overlap_comm="on", bucket_elements=50_000_000)
    zero = deepspeed_config(config, workload, ranks=2, device="cuda")["zero_optimization"]
    assert zero == {"overlap_comm": True, "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000,
                    "sub_group_size": 7, "stage": 2}  # fmt: skip
    plain = deepspeed_config(TrialConfig(**PLAIN), workload, ranks=2, device="cuda")["zero_optimization"]
    assert plain == {**own["zero_optimization"], "stage": 2}


@pytest.mark.parametrize(
    ("knobs", "setting", "expected"),
    [
        ({"overlap_comm": "off"}, "overlap_comm", False),
        ({"contiguous_gradients": "off"}, "contiguous_gradients", False),
        ({"round_robin_gradients": "on"}, "round_robin_gradients", True),
        ({"offload_optimizer": "cpu"}, "offload_optimizer", {"device": "cpu", "pin_memory": True}),
        ({"offload_optimizer": "cpu_half"}, "offload_optimizer", {"device": "cpu", "pin_memory": True, "ratio": 0.5}),
        ({"offload_optimizer": "cpu_half"}, "sub_group_size", 50_000_000),
        ({"offload_parameters": "cpu"}, "offload_param", {"device": "cpu", "pin_memory": True}),
        ({"parameter_group": 4}, "zero_hpz_partition_size", 4),
        ({"quantized_weights": "on"}, "zero_quantized_weights", True),
        ({"prefetch_elements": 200_000_000}, "stage3_prefetch_bucket_size", 200_000_000),
        ({"persistent_elements": 1_000_000}, "stage3_param_persistence_threshold", 1_000_000),
        ({"live_elements": 200_000_000}, "stage3_max_live_parameters", 200_000_000),
    ],
)
def test_zero_knobs_reach_zero_optimization(knobs: dict[str, object], setting: str, expected: object) -> None:
    document = deepspeed_config(TrialConfig(**PLAIN, **knobs), WORKLOAD, ranks=2, device="cuda")  # type: ignore[arg-type]
    assert document["zero_optimization"][setting] == expected


def test_torchs_fused_adam_is_asked_for_beside_the_learning_rate() -> None:
    document = deepspeed_config(TrialConfig(**PLAIN, optimizer="torch_fused"), WORKLOAD, ranks=1, device="cuda")
    assert {"torch_adam": True, "fused": True}.items() <= document["optimizer"]["params"].items()
    assert document["optimizer"]["params"]["lr"] > 0


def test_the_throughput_timer_is_switched_off_beside_the_users_other_timers() -> None:
    workload = HuggingFaceWorkload(model="gpt2-nano", seq_len=32, dtype="fp32", base_ds_config={"timers": {"other": 1}})
    config = TrialConfig(**PLAIN, throughput_timer="off")
    document = deepspeed_config(config, workload, ranks=1, device="cuda")
    assert document["timers"] == {"other": 1, "throughput": {"enabled": False}}


def test_bf16_is_written_in_place_of_fp16_whatever_the_user_set_for_it() -> None:
    own = {"fp16": {"enabled": True, "initial_scale_power": 8}}
    workload = HuggingFaceWorkload(model="gpt2-nano", seq_len=32, dtype="fp16", base_ds_config=own)
    assert dtype_of(deepspeed_config(TrialConfig(**PLAIN), workload, ranks=1, device="cuda")) == "fp16"
    config = TrialConfig(**PLAIN, precision="bf16")
    document = deepspeed_config(config, workload, ranks=1, device="cuda")
    assert dtype_of(document) == config.trained_dtype("fp16") == "bf16"
    assert document["bf16"] == {"enabled": True} and not document["fp16"]["enabled"]


def test_deepcompile_is_a_setting_and_the_other_ways_to_compile_are_none() -> None:
    for value, expected in (("deepcompile", {"deepcompile": True}), ("blocks", None), ("model", None)):
        document = deepspeed_config(TrialConfig(**PLAIN, compile=value), WORKLOAD, ranks=1, device="cuda")
        assert document.get("compile") == expected


def test_a_whole_valued_float_is_a_whole_number() -> None:
    assert whole_number("bucket_elements", 5e8) == 500_000_000
    assert isinstance(whole_number("bucket_elements", 5e8), int)
    for value in (0.5, float("inf"), float("nan"), True, "5e8"):
        with pytest.raises(ValueError, match="takes whole numbers"):
            whole_number("bucket_elements", value)
