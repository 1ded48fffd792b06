"""Which knobs have a meaning is read from the machine and the model."""

import dataclasses

import pytest

from ds_tune.objectives.cost_model.knob_context import knob_context_of
from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

GPT2_XL = HuggingFaceWorkload(model="gpt2-xl", seq_len=1024, dtype="fp16")


def test_the_site_is_read_from_the_machine_and_the_model() -> None:
    machine = Machine(device="cuda", name="NVIDIA H200", ranks=2, memory_bytes=GIB, compute_capability="9.0")
    context = knob_context_of(
        HuggingFaceWorkload(model="gpt2-xl", seq_len=1024, dtype="bf16", pretrained=True), machine
    )
    assert (context.compute_capability, context.dtype, context.pretrained) == ((9, 0), "bf16", True)
    assert (context.model_type, context.vocabulary, context.grouped_queries) == ("gpt2", 50257, False)
    unknown = dataclasses.replace(machine, compute_capability=None)
    assert knob_context_of(
        HuggingFaceWorkload(model="gpt2-xl", seq_len=1024, dtype="bf16"), unknown
    ).compute_capability == (0, 0)


def test_stage_0_is_left_out_in_fp16_alone() -> None:
    machine = Machine(device="cuda", name="NVIDIA H200", ranks=2, memory_bytes=GIB, compute_capability="9.0")
    assert not knob_context_of(GPT2_XL, machine).stage_0_trains
    assert knob_context_of(dataclasses.replace(GPT2_XL, dtype="bf16"), machine).stage_0_trains


def test_states_share_is_the_fraction_of_a_rank_s_memory_taken_by_model_states() -> None:
    machine = Machine(device="cuda", name="NVIDIA H200", ranks=2, memory_bytes=32 * GIB, compute_capability="9.0")
    # 1.56e9 parameters in two bytes, and 12 bytes of states for each over two ranks: 11.6 GiB.
    assert knob_context_of(GPT2_XL, machine).states_share == pytest.approx(0.363, abs=0.002)
    assert knob_context_of(GPT2_XL, dataclasses.replace(machine, ranks=1)).states_share == pytest.approx(
        0.635, abs=0.002
    )
    capped = dataclasses.replace(machine, memory_cap_bytes=16 * GIB)
    assert knob_context_of(GPT2_XL, capped).states_share == pytest.approx(0.725, abs=0.003)
