"""Engines of the size of a thimble, in a process group of this process alone."""

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import pytest
import torch
import transformers

from ds_tune.objectives.ds_config import deepspeed_config
from ds_tune.objectives.rank.cleanup import release_trial
from ds_tune.objectives.rank.distributed import skip_unused_ops
from ds_tune.objectives.rank.knobs import apply_to_engine, apply_to_model, configure_model
from ds_tune.objectives.rank.model import build_model
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

# For engines of this size a second thread is no help, and spins on a core that another test may want.
torch.set_num_threads(1)


@pytest.fixture(scope="package")
def one_rank() -> Iterator[None]:
    """A process group of this process alone, for torch and for DeepSpeed, whose own groups cannot be made twice."""
    # DeepSpeed reads them although the group is there already.
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    skip_unused_ops()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    yield
    torch.distributed.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def made() -> Iterator[list[deepspeed.DeepSpeedEngine]]:
    """The engines of a test, released behind it."""
    engines: list[deepspeed.DeepSpeedEngine] = []
    yield engines
    while engines:
        release_trial(engines.pop())
    gc.collect()


@pytest.fixture
def engine_of(one_rank: None, made: list[deepspeed.DeepSpeedEngine]) -> Callable[..., deepspeed.DeepSpeedEngine]:
    """Makes an engine as `objectives.rank.training` does; takes the stage and the knobs.

    The model is a GPT-2 of 501 tokens unless another is given. With `begins=False` nothing is done to the engine
    itself, such as compiling it.
    """

    def make(
        zero_stage: int = 0,
        *,
        layers: int = 4,
        accumulation: int = 1,
        described: transformers.PretrainedConfig | None = None,
        dtype: str = "fp32",
        device: str = "cpu",
        begins: bool = True,
        **knobs: Any,
    ) -> deepspeed.DeepSpeedEngine:
        workload = HuggingFaceWorkload(model="gpt2-nano", seq_len=16, dtype=dtype)
        config = TrialConfig(
            zero_stage=zero_stage, micro_batch_size=2, gradient_accumulation_steps=accumulation, **knobs
        )
        ds_config = deepspeed_config(config, workload, ranks=1, device=device)
        described = described or transformers.GPT2Config(
            n_layer=layers, n_embd=32, n_head=2, n_positions=16, vocab_size=501, use_cache=False
        )
        model = build_model(workload, configure_model(described, config.model_knobs), ds_config, torch.device("cpu"))
        apply_to_model(model, config.model_knobs)
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds_config)
        made.append(engine)
        if begins:
            apply_to_engine(engine, config.model_knobs)
        return engine

    return make
