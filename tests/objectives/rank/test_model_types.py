"""Every model type of transformers with a causal or masked head: counted exactly, trained, and in docs/support.md."""

import importlib.util
import math
import warnings
from pathlib import Path

import pytest
import torch
import transformers

from ds_tune.objectives.cost_model.architecture import architecture_of_facts
from ds_tune.objectives.rank.describe import describe
from ds_tune.objectives.rank.model import flops_per_sample
from ds_tune.objectives.rank.model_config import NOT_TRAINED, Refusal, head_of
from ds_tune.objectives.workload.model_sizes import POSITIONS_BEGIN_AFTER_PADDING

torch.set_num_threads(1)

# Beside this file, and a program of its own: tests are no package.
_spec = importlib.util.spec_from_file_location("tiny_models", Path(__file__).with_name("tiny_models.py"))
assert _spec is not None and _spec.loader is not None
tiny_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_models)

DOCUMENTED = tiny_models.TABLE.search(tiny_models.SUPPORT.read_text())
TRAINED = [each for each in tiny_models.MODEL_TYPES if each not in {*tiny_models.NOT_TRIED, *NOT_TRAINED}]


@pytest.fixture(autouse=True)
def quiet() -> None:
    """transformers warns of what only matters to weights that are used."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")


@pytest.mark.parametrize("model_type", TRAINED)
def test_a_model_type_is_counted_exactly_and_trains_on_samples_as_long_as_is_said(model_type: str) -> None:
    config = tiny_models.tiny_config(model_type)
    facts = describe(config)
    counted = architecture_of_facts(facts)
    model = tiny_models.built(config)
    real = sum(parameter.numel() for parameter in model.parameters())
    assert counted.is_exact
    assert (counted.parameters, type(model).__name__) == (real, facts.trained_class)
    assert counted.flops_per_sample(8) == flops_per_sample(config, real, 8)
    longest = facts.positions or tiny_models.LENGTH
    assert math.isfinite(tiny_models.train(model, longest if longest <= 64 else tiny_models.LENGTH))
    if model_type in POSITIONS_BEGIN_AFTER_PADDING:
        assert longest == config.max_position_embeddings - config.pad_token_id - 1
        with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
            tiny_models.train(model, longest + 1)
    assert DOCUMENTED is not None
    assert tiny_models.row(model_type, has_trained=True) in DOCUMENTED[0].splitlines()


def test_the_table_of_model_types_has_each_of_transformers_types() -> None:
    assert DOCUMENTED is not None
    lines = DOCUMENTED[0].splitlines()
    rows = [line.split("`")[1] for line in lines if line.startswith("| `")]
    assert rows == tiny_models.MODEL_TYPES
    assert "\n".join(tiny_models.other_types()).rstrip() in DOCUMENTED[0]
    for model_type in {*tiny_models.NOT_TRIED, *NOT_TRAINED} & {*rows}:
        assert tiny_models.row(model_type) in lines


@pytest.mark.parametrize("model_type", tiny_models.NOT_TRIED)
def test_a_model_type_that_was_not_tried_still_cannot_be(model_type: str) -> None:
    with pytest.raises(Exception):  # noqa: B017 - whatever transformers says
        tiny_models.train(tiny_models.built(tiny_models.tiny_config(model_type)))


@pytest.mark.parametrize("model_type", NOT_TRAINED)
def test_a_model_type_that_needs_more_than_tokens_is_refused(model_type: str) -> None:
    with pytest.raises(Refusal, match=f"models of type {model_type} are not trained here"):
        head_of(tiny_models.tiny_config(model_type))


# The developers' own figures, in billions: parameters, and those that a token uses.
PUBLISHED = {
    "Mixtral-8x7B": (46.7, 12.9, {"model_type": "mixtral"}),
    "Qwen3-30B-A3B": (30.5, 3.3, {"model_type": "qwen3_moe", "num_hidden_layers": 48, "num_attention_heads": 32,
                                  "head_dim": 128, "num_experts": 128, "intermediate_size": 6144}),
    "OLMoE-1B-7B": (6.9, 1.3, {"model_type": "olmoe", "intermediate_size": 1024}),
    "DeepSeek-V3": (671, 37.5, {"model_type": "deepseek_v3"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_total_and_active_parameters_of_a_mixture_of_experts_are_the_published_ones(name: str) -> None:
    total, active, fields = PUBLISHED[name]
    document = dict(fields)
    facts = describe(transformers.AutoConfig.for_model(document.pop("model_type"), **document))
    assert facts.parameters / 1e9 == pytest.approx(total, rel=0.01)
    assert facts.parameters_per_token / 1e9 == pytest.approx(active, rel=0.03)


def test_layers_that_are_shared_are_counted_once_and_multiplied_each_time() -> None:
    once, often = (
        describe(transformers.AlbertConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=layers))
        for layers in (1, 10)
    )
    assert once.parameters == often.parameters == once.parameters_per_token
    assert often.parameters_per_token - often.parameters == pytest.approx(9 * often.block_parameters, rel=0.01)
    assert often.layers == 10
