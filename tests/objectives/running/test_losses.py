"""The losses of real DeepSpeed on two ranks: every way of training gives the same ones, and a wrong one is found."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.numerics import STEPS, LossCurve, NumericsCheck
from ds_tune.objectives.running.deepspeed_objective import DeepSpeedObjective
from ds_tune.objectives.trial import Failure, FailureKind, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

pytestmark = pytest.mark.slow

REFERENCE = TrialConfig(zero_stage=0, micro_batch_size=1, gradient_accumulation_steps=4)


@pytest.fixture
def check(
    objective: Callable[..., DeepSpeedObjective], workload: HuggingFaceWorkload, tmp_path: Path
) -> Callable[..., list[NumericsCheck]]:
    """Compares configurations with `REFERENCE`, in the same ranks."""

    def run(*configs: TrialConfig, dtype: str = "fp32", model: str = workload.model) -> list[NumericsCheck]:
        training = objective(workload=dataclasses.replace(workload, dtype=dtype, model=model))
        curves = []
        for config in (REFERENCE, *configs):
            folder = tmp_path / config.name
            folder.mkdir(exist_ok=True)
            curve = training.losses(config, folder, lambda phase: None)
            assert isinstance(curve, LossCurve), curve
            assert len(curve.losses) == STEPS
            curves.append(curve)
        return [
            NumericsCheck(reference=REFERENCE.name, dtype=dtype, curve=curve, reference_curve=curves[0])
            for curve in curves[1:]
        ]

    return run


def cut(stage: int, **knobs: int | str) -> TrialConfig:
    """The same 8 samples a step on two ranks, in larger micro-batches."""
    return TrialConfig(zero_stage=stage, micro_batch_size=2, gradient_accumulation_steps=2, **knobs)  # type: ignore[arg-type]


def test_every_stage_and_every_knob_that_keeps_the_numbers_gives_the_same_losses(
    check: Callable[..., list[NumericsCheck]],
) -> None:
    configs = [*(cut(stage) for stage in range(4)), cut(1, activation_checkpointing=1), cut(3, padded_vocabulary=100)]
    checks = check(*configs)
    assert [each.fault for each in checks] == [None] * len(configs)
    assert all(0 < each.first_loss_error < 1e-6 and each.learned_error < 1e-3 for each in checks)
    learned = checks[0].reference_curve.losses
    assert learned[-1] < learned[0] - 0.1


TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 500},
        {
            "model_type": "deberta-v2", "architectures": ["DebertaV2ForMaskedLM"], "vocab_size": 500,
            "relative_attention": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "conv_kernel_size": 3,
        },
        {"model_type": "llama", "num_key_value_heads": 2, "vocab_size": 500, "pad_token_id": 0},
    ],
    ids=lambda fields: fields["model_type"],
)  # fmt: skip
def test_models_of_other_kinds_begin_and_learn_partitioned_as_they_do_whole(
    fields: dict[str, Any], objective: Callable[..., DeepSpeedObjective], workload: HuggingFaceWorkload, tmp_path: Path
) -> None:
    """ZeRO-3 comes first, when nothing of the model has been imported yet."""
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **fields}))
    training = objective(workload=dataclasses.replace(workload, model=str(tmp_path)))
    curves = []
    for config in (cut(3), cut(0)):
        curve = training.losses(config, tmp_path, lambda phase: None)
        assert isinstance(curve, LossCurve), curve
        curves.append(curve)
    partitioned, whole = curves
    check = NumericsCheck(reference="z0", dtype="fp32", curve=partitioned, reference_curve=whole)
    assert check.fault is None
    assert whole.losses[-1] < whole.losses[0]


def test_bf16_keeps_them_within_its_own_rounding(check: Callable[..., list[NumericsCheck]], tmp_path: Path) -> None:
    # Most CPUs have no instruction for bf16: the nano model would take a minute of a core.
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "model_type": "gpt2", "vocab_size": 500}))
    checks = check(cut(0), cut(1), cut(3), dtype="bf16", model=str(tmp_path))
    assert [each.fault for each in checks] == [None] * 3


def test_an_output_projection_that_loses_logits_is_found(
    check: Callable[..., list[NumericsCheck]], fault: Callable[[str], Path]
) -> None:
    fault("rank=* phase=forward kind=cut_projection")
    right, wrong = check(cut(1), cut(1, padded_vocabulary=100))
    assert right.fault is None
    assert wrong.fault is not None and "its first loss is" in wrong.fault


def test_ranks_that_do_not_share_their_gradients_are_found(
    check: Callable[..., list[NumericsCheck]], fault: Callable[[str], Path]
) -> None:
    """Each rank then learns from its own samples alone; the first loss is right, what follows is not."""
    fault("rank=* phase=numerics kind=own_gradients")
    [wrong] = check(cut(1))
    assert wrong.first_loss_error < 1e-6
    assert wrong.fault is not None and "of what was learned" in wrong.fault


def test_losses_of_a_configuration_that_does_not_fit_are_a_failure(
    objective: Callable[..., DeepSpeedObjective], machine: Machine, tmp_path: Path
) -> None:
    # Whatever does not fit is never touched: 2 GiB of logits alone.
    training = objective(machine=dataclasses.replace(machine, memory_cap_bytes=GIB))
    failure = training.losses(TrialConfig(zero_stage=0, micro_batch_size=4096, gradient_accumulation_steps=1),
                              tmp_path, lambda phase: None)  # fmt: skip
    assert isinstance(failure, Failure) and failure.kind is FailureKind.OUT_OF_MEMORY, failure
