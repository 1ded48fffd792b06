"""Predictions of six configurations to the last digit, so that a change of form is seen not to change a figure."""

from typing import Any

import pytest

from ds_tune.objectives.cost_model.architecture import architecture_from_config
from ds_tune.objectives.cost_model.hardware import parse_hardware
from ds_tune.objectives.cost_model.memory import predict_memory
from ds_tune.objectives.cost_model.step_time import predict_step
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.huggingface import SHIPPED_MODELS

LLAMA = {"model_type": "llama", "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}
BERT = {"model_type": "bert"}
DEBERTA = {
    "model_type": "deberta-v2", "num_hidden_layers": 48, "relative_attention": True, "position_buckets": 256,
    "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
    "conv_kernel_size": 3,
}  # fmt: skip
XL = SHIPPED_MODELS["gpt2-xl"]

GOLDEN = [
    # Model, hardware, seq_len, dtype; (stage, mbs, gas), knobs; seconds of compute, launch, hooks, communication and
    # optimizer; bytes of the backward pass, of the optimizer step, and of the large tensors in each.
    (XL, "1xH200", 1024, "fp16", (0, 16, 1), {},
     (0.4786877013, 0.1056, 0, 0, 0.08538530333), (104968374656, 37682668800, 3293642752, 6391267200)),
    (XL, "2xH100", 1024, "fp16", (1, 8, 4), {"activation_checkpointing": 1, "overlap_comm": "on"},
     (1.48604022, 1.1392, 0.0576, 0.01278407467, 0.07342230687), (23074867328, 18991334400, 2646821376, 3276044800)),
    (XL, "2xH100", 1024, "bf16", (2, 4, 2), {"offload_optimizer": "cpu", "compile": "blocks"},
     (0.2215921236, 0.14784, 0.0288, 0.1284941422, 0.6964667869), (17741752064, 5972833600, 1823410688, 160822400)),
    (LLAMA, "8xA100-80GB", 2048, "bf16", (3, 2, 4), {"parameter_group": 2, "offload_optimizer": "cpu_half"},
     (5.768885788, 4.62336, 0, 1.008144829, 0.5087109757), (51971236096, 22368087808, 3101346304, 3050673152)),
    (DEBERTA, "16xV100-32GB", 256, "fp16", (2, 8, 1), {"dropout": "none"},
     (0.4082044987, 0.54912, 0.0288, 0.1914251278, 0.1005469037), (18565042707, 5392885317, 1524697600, 785283609)),
    (BERT, "16xV100-32GB", 128, "fp32", (0, 128, 1), {},
     (0.9417520602, 0.0528, 0, 0.01768928725, 0.03741873193), (17580707256, 2052228768, 2000289792, 93763584)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "hardware", "seq_len", "dtype", "batch", "knobs", "seconds", "moment_bytes"),
    GOLDEN,
    ids=["gpt2-xl", "checkpointed", "offloaded", "grouped", "deberta", "fp32"],
)
def test_seconds_and_bytes_of_a_configuration_are_the_golden_ones(
    model: dict[str, Any],
    hardware: str,
    seq_len: int,
    dtype: str,
    batch: tuple[int, int, int],
    knobs: dict[str, Any],
    seconds: tuple[float, ...],
    moment_bytes: tuple[float, ...],
) -> None:
    architecture, machine = architecture_from_config(model, "golden"), parse_hardware(hardware)
    stage, micro_batch, accumulation = batch
    config = TrialConfig(
        zero_stage=stage, micro_batch_size=micro_batch, gradient_accumulation_steps=accumulation, **knobs
    )
    step = predict_step(config, architecture, machine, seq_len=seq_len, dtype=dtype)
    memory = predict_memory(config, architecture, ranks=machine.ranks, seq_len=seq_len, dtype=dtype)
    assert (step.compute, step.launch, step.hooks, step.communication, step.optimizer) == pytest.approx(
        seconds, rel=1e-9
    )
    moments = (memory.backward_bytes, memory.step_bytes, memory.large_in_backward, memory.large_in_step)
    assert moments == pytest.approx(moment_bytes, rel=1e-9)
