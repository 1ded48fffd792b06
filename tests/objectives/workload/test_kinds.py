"""Every kind of training keeps the contract that the rest of ds-tune relies on."""

import json
from pathlib import Path

import pytest

from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.objectives.workload.kinds import KINDS, Workload, workload_from_json
from ds_tune.objectives.workload.script import ScriptStart, ScriptWorkload
from ds_tune.objectives.workload.script_facts import ScriptFacts

EXAMPLES: dict[str, Workload] = {
    "hugging_face": HuggingFaceWorkload(
        model="gpt2-nano",
        seq_len=32,
        dtype="bf16",
        dataset="text.txt",
        tokenizer="folder",
        base_ds_config={"gradient_clipping": 0.5},
    ),
    "script": ScriptWorkload(
        start=ScriptStart(
            program="/home/me/train.py",
            is_module=False,
            arguments=("--batch-size", "4"),
            local_rank_flag="--local_rank",
            environment={"ACCELERATE_USE_DEEPSPEED": "true"},
            folder="/home/me",
            launcher=("deepspeed", "--num_gpus", "2"),
        ),
        facts=ScriptFacts(
            loop="DeepSpeed",
            ds_config={"train_micro_batch_size_per_gpu": 4},
            zero_stage=1,
            micro_batch_size=4,
            gradient_accumulation_steps=2,
            dtype="bf16",
            parameters=1000,
            trainable_parameters=10,
            model={"model_type": "gpt2"},
            samples_per_micro_batch=4,
            tokens_per_sample=None,
            loader_follows=False,
            micro_batch_flag="--batch-size",
            initialized_at="train.py:3",
        ),
    ),
}
"""A workload of each kind."""


def test_every_kind_has_an_example() -> None:
    assert set(EXAMPLES) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_workload_comes_back_from_its_json_with_its_kind(kind: str) -> None:
    workload = EXAMPLES[kind]
    document = json.loads(json.dumps(workload.to_json()))
    assert document["type"] == kind
    assert workload_from_json(document) == workload


@pytest.mark.parametrize("kind", KINDS)
def test_workload_says_what_is_trained(kind: str) -> None:
    workload = EXAMPLES[kind]
    assert workload.title in workload.description
    assert workload.dtype in ("fp16", "bf16", "fp32")
    assert workload.tokens_per_sample is None or workload.tokens_per_sample > 0
    config = TrialConfig(zero_stage=1, micro_batch_size=8, gradient_accumulation_steps=1)
    assert workload.launch_line(["deepspeed"], 2, Path("ds.json"), config)[0] == "deepspeed"
    document = workload.model_document()
    assert document is None or "model_type" in document


def test_workload_stored_before_there_were_kinds_is_a_hugging_face_model() -> None:
    document = EXAMPLES["hugging_face"].to_json()
    del document["type"]
    assert workload_from_json(document) == EXAMPLES["hugging_face"]
