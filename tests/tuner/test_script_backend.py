"""What a script trains with today is always part of what is searched, and comes first."""

from pathlib import Path
from typing import Any

import pytest

from ds_tune.objectives.cost_model.hardware import hardware_of
from ds_tune.objectives.cost_model.prior import FlatPrior
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.script import ScriptFacts, ScriptStart, ScriptWorkload
from ds_tune.tuner import script_backend
from ds_tune.tuner.limits import Limits
from ds_tune.tuner.request import TuneRequest
from ds_tune.tuner.sampler import make_sampler
from ds_tune.tuner.space import study_space

MACHINE = Machine(device="cuda", name="NVIDIA H200", ranks=2, device_ids=(0, 1), memory_bytes=140 * GIB)


def script(**facts: Any) -> ScriptWorkload:
    known = {
        "loop": "DeepSpeed", "ds_config": {}, "zero_stage": 3, "micro_batch_size": 100,
        "gradient_accumulation_steps": 4, "dtype": "bf16", "parameters": 100, "trainable_parameters": 100,
        "model": None, "samples_per_micro_batch": 100, "tokens_per_sample": None, "loader_follows": True, **facts,
    }  # fmt: skip
    start = ScriptStart(
        program="/train.py", is_module=False, arguments=(), local_rank_flag=None, environment={}, folder="/",
        launcher=(),
    )  # fmt: skip
    return ScriptWorkload(start=start, facts=ScriptFacts(**known))


def own_and_limits(workload: ScriptWorkload, **fields: Any) -> tuple[TrialConfig, Limits]:
    request = TuneRequest(script=("train.py",), results=Path("results"), **fields)
    own = script_backend._own(workload, request, MACHINE)
    return own, script_backend._limits(request, own, MACHINE)


@pytest.mark.parametrize(
    ("fields", "held"),
    [
        ({}, 800),
        ({"max_micro_batch": 8}, 800),
        ({"global_batch": 400}, 400),
        ({"free_batch": True}, None),
        ({"max_global_batch": 64}, None),
    ],
)
def test_own_configuration_is_legal_and_the_first_baseline(fields: dict[str, Any], held: int | None) -> None:
    workload = script()
    own, limits = own_and_limits(workload, **fields)
    assert limits.global_batch == held
    space = study_space(limits, preset="core", allowed=(), workload=workload, machine=MACHINE, own=own)
    assert limits.allow(own)
    sampler = make_sampler("cost-model", space, 0, FlatPrior(hardware_of(MACHINE)))
    assert sampler.baselines([])[0] == own
    for field, value in space.params(own).items():
        assert space.distributions[field]._contains(space.distributions[field].to_internal_repr(value))


def test_a_global_batch_that_the_script_cannot_have_is_refused() -> None:
    with pytest.raises(UsageError, match="must be a multiple of the script's micro-batches, 100 on each of 2 ranks"):
        own_and_limits(script(), global_batch=300)


def test_a_script_that_loses_its_gradients_is_told_so() -> None:
    with pytest.raises(UsageError, match="trains in fp16 at ZeRO stage 0, where the installed DeepSpeed loses"):
        own_and_limits(script(zero_stage=0, dtype="fp16"))
    assert own_and_limits(script(zero_stage=0))[0].zero_stage == 0
