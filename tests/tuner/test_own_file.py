"""The configuration that a person's DeepSpeed file describes, and its precision."""

import dataclasses
from typing import Any

import pytest

from ds_tune.objectives.cost_model.hardware import parse_hardware
from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.ds_file import DsFile
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.tuner.own_file import own_configuration, precision_for

GPU, CPU = {"fp16", "bf16", "fp32"}, {"bf16", "fp32"}


def machine(ranks: int, device: str = "cuda") -> Machine:
    return Machine(device=device, name="an imagined one", ranks=ranks, memory_bytes=80 * GIB)


def own(document: dict[str, Any], ranks: int = 2, dtype: str = "bf16", device: str = "cuda") -> Any:
    return own_configuration(DsFile(document=document, rewritten=()), dtype, machine(ranks, device))


@pytest.mark.parametrize(
    ("document", "name", "holds"),
    [
        ({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 4}, "z3_gas1_tmbspg4", True),
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4}, "z0_gas4_tmbspg4", True),
        ({"train_batch_size": 32, "gradient_accumulation_steps": 8}, "z0_gas8_tmbspg2", True),
        ({"train_batch_size": 32}, "z0_gas1_tmbspg16", True),
        ({"gradient_accumulation_steps": 8, "train_batch_size": "auto"}, "z0_gas8_tmbspg1", False),
        ({"zero_optimization": {"stage": 2}, "train_batch_size": "auto"}, "z2_gas1_tmbspg1", False),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
         "z2_offload-cpu_gas1_tmbspg1", False),
    ],
)  # fmt: skip
def test_own_configuration_is_what_the_file_says_and_the_rest_is_untuned(
    document: dict[str, Any], name: str, holds: bool
) -> None:
    found = own(document)
    assert (found.config.name, found.holds_batch) == (name, holds)


@pytest.mark.parametrize("document", [{}, {"gradient_clipping": 0.5}, {"zero_optimization": {"overlap_comm": True}}])
def test_file_that_says_nothing_of_what_is_searched_has_no_configuration(document: dict[str, Any]) -> None:
    assert own(document).config is None


@pytest.mark.parametrize("zero", ["auto", True, {"stage": "auto", "reduce_bucket_size": "auto"}], ids=str)
def test_cost_model_takes_what_the_file_leaves_open(zero: Any) -> None:
    workload = HuggingFaceWorkload(
        model="gpt2-nano", seq_len=32, dtype="bf16", base_ds_config={"zero_optimization": zero}
    )
    open_zero, untold = (
        CostModel(each, parse_hardware("2xH200"))
        for each in (workload, dataclasses.replace(workload, base_ds_config={}))
    )
    config = TrialConfig(zero_stage=2, micro_batch_size=1, gradient_accumulation_steps=1)
    assert open_zero.predict(config) == untold.predict(config)


def test_offload_is_no_knob_on_a_cpu() -> None:
    document = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert own(document, device="cpu").config.name == "z2_gas1_tmbspg1"


def test_file_for_another_number_of_ranks_keeps_its_global_batch_and_that_is_said() -> None:
    written = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    found = own(written, ranks=2)
    assert found.config.name == "z0_gas8_tmbspg4"
    assert found.notes == (
        "`ds_config` is for 8 ranks; on 2 its train_batch_size of 64 takes gradient_accumulation_steps 8.",
    )


@pytest.mark.parametrize(
    "document",
    [
        {"train_batch_size": 33},
        {"train_batch_size": 1},
        {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 5},
        {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3},
        {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1},
    ],
    ids=str,
)
def test_batch_sizes_that_contradict_each_other_are_refused(document: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="`ds_config`: train_batch_size"):
        own(document)


def test_stage_0_in_fp16_stands_for_stage_1() -> None:
    found = own({"zero_optimization": {"stage": 0}, "train_batch_size": 8}, dtype="fp16")
    assert found.config.zero_stage == 1
    assert "1 stands for it" in found.notes[0]


@pytest.mark.parametrize(
    ("dtype", "document", "model", "runs", "expected"),
    [
        ("fp32", {}, {"dtype": "bfloat16"}, GPU, ("fp32", "`dtype`")),
        ("bf16", {"bf16": {"enabled": True}}, None, GPU, ("bf16", "`dtype`")),
        (None, {"bf16": {"enabled": True}}, {"dtype": "float16"}, GPU, ("bf16", "`ds_config`")),
        (None, {"bf16": {"enabled": "auto"}}, {"torch_dtype": "bfloat16"}, GPU, ("bf16", "the model's configuration")),
        (None, {}, {"dtype": "float32"}, GPU, ("fp32", "the model's configuration")),
        (None, {}, {"text_config": {"dtype": "torch.bfloat16"}}, GPU, ("bf16", "the model's configuration")),
        (None, {}, {"dtype": "float16"}, CPU, ("fp32", "the default on a CPU")),
        (None, {}, {"dtype": "auto"}, GPU, ("fp16", "the default on a GPU")),
        (None, {}, None, GPU, ("fp16", "the default on a GPU")),
    ],
)
def test_precision_is_what_was_asked_for_else_the_file_s_else_the_model_s(
    dtype: str | None, document: dict[str, Any], model: dict[str, Any] | None, runs: set[str], expected: tuple[str, str]
) -> None:
    found = precision_for(dtype, document, model, "fp16" if "fp16" in runs else "fp32", runs=runs)
    assert (found.dtype, found.origin) == expected


@pytest.mark.parametrize(
    ("dtype", "document", "sentence"),
    [
        (
            "fp16",
            {"bf16": {"enabled": True}},
            "`dtype=fp16` contradicts `ds_config`, which enables bf16; leave one out",
        ),
        ("bf16", {"bf16": {"enabled": False}, "fp16": {"enabled": False}}, "which enables neither fp16 nor bf16"),
        (None, {"fp16": {"enabled": True}}, "`ds_config` enables fp16, which is not to be had here"),
    ],
)
def test_precision_that_contradicts_the_file_or_is_not_there_is_refused(
    dtype: str | None, document: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError) as raised:
        precision_for(dtype, document, None, "fp32", runs=CPU)
    assert sentence in str(raised.value)
