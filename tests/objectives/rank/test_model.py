"""Models: where their configuration comes from, which head trains them, and what is counted."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.rank.model import build_model, count_parameters, flops_per_sample
from ds_tune.objectives.rank.model_config import load_config, model_class
from ds_tune.objectives.workload.huggingface import SHIPPED_MODELS, HuggingFaceWorkload

NANO = HuggingFaceWorkload(model="gpt2-nano", seq_len=32, dtype="fp32")
STAGE_0 = {"zero_optimization": {"stage": 0}}


def local(folder: Path, **fields: Any) -> HuggingFaceWorkload:
    """A workload whose model is a configuration in a folder."""
    (folder / "config.json").write_text(json.dumps(fields))
    return dataclasses.replace(NANO, model=str(folder))


@pytest.mark.parametrize("model", SHIPPED_MODELS)
def test_every_shipped_model_has_a_configuration_that_needs_no_hub(model: str) -> None:
    config = load_config(dataclasses.replace(NANO, model=model))
    assert model_class(config) is transformers.AutoModelForCausalLM
    assert config.use_cache is False


@pytest.mark.parametrize(
    ("model", "millions"), [("gpt2", 124.4), ("gpt2-medium", 354.8), ("gpt2-large", 774.0), ("gpt2-xl", 1557.6)]
)
def test_the_shipped_gpt2_models_have_the_published_sizes(model: str, millions: float) -> None:
    config = load_config(dataclasses.replace(NANO, model=model))
    model = build_model(dataclasses.replace(NANO, model=model), config, STAGE_0, torch.device("meta"))
    assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=0.05)


def test_a_causal_model_is_trained_as_one(tmp_path: Path) -> None:
    config = load_config(local(tmp_path, model_type="llama"))
    assert model_class(config) is transformers.AutoModelForCausalLM


def test_a_model_that_says_it_is_masked_is_trained_as_that(tmp_path: Path) -> None:
    config = load_config(local(tmp_path, model_type="bert", architectures=["BertForMaskedLM"]))
    assert model_class(config) is transformers.AutoModelForMaskedLM


@pytest.mark.parametrize("model_type", ["vit", "t5"])
def test_a_model_without_a_head_to_train_is_refused(tmp_path: Path, model_type: str) -> None:
    with pytest.raises(UsageError, match=f"models of type {model_type} have no language-model head"):
        load_config(local(tmp_path, model_type=model_type))


@pytest.mark.parametrize(
    "fields",
    [{"model_type": "nonesuch"}, {"model_type": "gpt2", "n_embd": "wide"}],
    ids=["unknown type", "a field of the wrong type"],
)
def test_a_configuration_that_transformers_cannot_read_is_refused_in_one_sentence(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=r"cannot be loaded: ") as raised:
        load_config(local(tmp_path, **fields))
    assert "\n" not in str(raised.value)


def test_sizes_that_cannot_be_are_refused_wherever_the_configuration_is_from(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be built: its n_embd of 768 cannot be divided among 7 heads"):
        load_config(local(tmp_path, model_type="gpt2", n_head=7))


def test_a_hub_model_that_cannot_be_had_is_refused() -> None:
    with pytest.raises(UsageError, match="`model=nobody/nothing` cannot be loaded"):
        load_config(dataclasses.replace(NANO, model="nobody/nothing"))


def test_a_sequence_longer_than_the_model_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at most 16 positions; `seq_len=32` is too long"):
        load_config(local(tmp_path, model_type="gpt2", n_positions=16))


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_model_is_built_in_the_precision_that_deepspeed_is_told(dtype: str, expected: torch.dtype) -> None:
    ds_config = {**STAGE_0, dtype: {"enabled": True}}
    model = build_model(NANO, load_config(NANO), ds_config, torch.device("cpu"))
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model.training


def test_pretrained_weights_come_from_the_folder_they_were_saved_to(tmp_path: Path) -> None:
    saved = build_model(NANO, load_config(NANO), STAGE_0, torch.device("cpu"))
    with torch.no_grad():
        saved.get_input_embeddings().weight.fill_(0.25)
    saved.save_pretrained(tmp_path)
    workload = dataclasses.replace(NANO, model=str(tmp_path), pretrained=True)
    model = build_model(workload, load_config(workload), STAGE_0, torch.device("cpu"))
    assert torch.all(model.get_input_embeddings().weight == 0.25)


def test_flops_are_the_palm_paper_s() -> None:
    config = load_config(NANO)
    assert flops_per_sample(config, parameters=1000, seq_len=32) == 32 * (6 * 1000 + 12 * 4 * 128 * 32)
