"""What a script trains with today is always part of what is searched, and comes first."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ds_tune.objectives.cost_model.hardware import hardware_of
from ds_tune.objectives.cost_model.prior import FlatPrior
from ds_tune.objectives.ds_config import deepspeed_config
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.script import ScriptStart, ScriptWorkload
from ds_tune.objectives.workload.script_facts import ScriptFacts
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


OFFLOADED = {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}


def test_offload_of_the_script_s_file_is_its_own_knob_and_may_go() -> None:
    workload = script(ds_config=OFFLOADED)
    own, limits = own_and_limits(workload)
    assert own.offload_optimizer == "cpu"
    space = study_space(limits, preset="core", allowed=(), workload=workload, machine=MACHINE, own=own)
    assert {config.offload_optimizer for config in space.legal} == {"off", "cpu"}
    assert {config.zero_stage for config in space.legal} == {0, 1, 2, 3}
    without = dataclasses.replace(own, offload_optimizer="off")
    laid, bare = (deepspeed_config(config, workload, ranks=2, device="cuda") for config in (own, without))
    assert laid["zero_optimization"] == OFFLOADED["zero_optimization"]
    assert bare["zero_optimization"] == {"stage": 3}


def test_offload_of_a_script_with_an_optimizer_of_its_own_stays_in_every_trial() -> None:
    workload = script(ds_config={"zero_optimization": OFFLOADED["zero_optimization"]})
    own, _ = own_and_limits(workload)
    assert own.knobs_on == {}
    laid = deepspeed_config(own, workload, ranks=2, device="cuda")
    assert laid["zero_optimization"] == OFFLOADED["zero_optimization"]


def test_monitors_of_the_script_s_file_are_off_in_trials_and_kept_in_the_export() -> None:
    workload = script(ds_config={"wandb": {"enabled": True}, "wall_clock_breakdown": True, "steps_per_print": 5})
    own, _ = own_and_limits(workload)
    laid = deepspeed_config(own, workload, ranks=2, device="cuda")
    assert not {"wandb", "wall_clock_breakdown"} & set(laid) and laid["steps_per_print"] > 10**6
    exported = deepspeed_config(own, workload, ranks=2, device="cuda", exported=True)
    assert exported.items() >= workload.base_ds_config.items()


def test_script_whose_ranks_share_samples_is_refused() -> None:
    with pytest.raises(UsageError, match="sequence_parallel_size has ranks share samples"):
        own_and_limits(script(ds_config={"sequence_parallel_size": 2}))


def test_a_script_that_loses_its_gradients_is_told_so() -> None:
    with pytest.raises(UsageError, match="trains in fp16 at ZeRO stage 0, where the installed DeepSpeed loses"):
        own_and_limits(script(zero_stage=0, dtype="fp16"))
    assert own_and_limits(script(zero_stage=0))[0].zero_stage == 0
