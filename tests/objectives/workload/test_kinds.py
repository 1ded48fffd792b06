"""Every kind of training keeps the contract that the rest of ds-tune relies on."""

import json

import pytest

from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.objectives.workload.kinds import KINDS, Workload, workload_from_json

EXAMPLES: dict[str, Workload] = {
    "hugging_face": HuggingFaceWorkload(
        model="gpt2-nano",
        seq_len=32,
        dtype="bf16",
        dataset="text.txt",
        tokenizer="folder",
        base_ds_config={"gradient_clipping": 0.5},
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
    assert workload.training_words()
    document = workload.model_document()
    assert document is None or "model_type" in document


def test_workload_stored_before_there_were_kinds_is_a_hugging_face_model() -> None:
    document = EXAMPLES["hugging_face"].to_json()
    del document["type"]
    assert workload_from_json(document) == EXAMPLES["hugging_face"]
