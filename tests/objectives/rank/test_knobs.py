"""Every knob reaches DeepSpeed, torch and transformers: what is looked at is the live engine and its model."""

import copy
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import pytest
import torch
import torch._inductor.config
import transformers

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.rank.knobs import apply_to_model, configure_model
from ds_tune.objectives.rank.model import build_model
from ds_tune.objectives.trial import KNOBS
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

VOCABULARY = 501
WORKLOAD = HuggingFaceWorkload(model="gpt2-nano", seq_len=16, dtype="fp32")

needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")


@pytest.fixture(autouse=True)
def no_compiler_processes() -> Iterator[None]:
    """Inductor compiles in this process, not in workers that outlive the test."""
    with torch._inductor.config.patch(compile_threads=1):
        yield


def model_config(**fields: Any) -> transformers.GPT2Config:
    sizes = {"n_layer": 4, "n_embd": 32, "n_head": 2, "n_positions": 16, "vocab_size": VOCABULARY, **fields}
    return transformers.GPT2Config(use_cache=False, **sizes)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def losses(engine: deepspeed.DeepSpeedEngine, steps: int = 2) -> list[float]:
    """Of whole optimizer steps on one batch."""
    found = []
    for _ in range(steps):
        loss = engine(**batch()).loss
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found


def plain_model(**fields: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(model_config(n_layer=2, **fields)).eval()


@pytest.mark.parametrize(("every", "expected"), [(0, [0, 0, 0, 0]), (1, [1, 1, 1, 1]), (2, [1, 0, 1, 0])])
def test_every_so_many_blocks_forget_their_activations(
    every: int, expected: list[int], engine_of: Callable[..., deepspeed.DeepSpeedEngine]
) -> None:
    engine = engine_of(activation_checkpointing=every, dropout="none")
    assert [int(block.gradient_checkpointing) for block in engine.module.transformer.h] == expected
    runs = [0] * len(expected)

    def counter(number: int) -> Callable[..., None]:
        def count(*_: Any) -> None:
            runs[number] += 1

        return count

    for number, block in enumerate(engine.module.transformer.h):
        block.attn.register_forward_hook(counter(number))
    engine.backward(engine(**batch()).loss)
    assert runs == [1 + again for again in expected]


def test_activation_checkpointing_leaves_the_numbers(engine_of: Callable[..., deepspeed.DeepSpeedEngine]) -> None:
    assert losses(engine_of(activation_checkpointing=2, dropout="none")) == pytest.approx(
        losses(engine_of(dropout="none")), abs=1e-6
    )


@needs_a_compiler
def test_each_block_is_compiled_and_the_loss_stays(engine_of: Callable[..., deepspeed.DeepSpeedEngine]) -> None:
    plain = engine_of(layers=2, dropout="none")
    names = [name for name, _ in plain.module.named_parameters()]
    expected = losses(plain)
    compiled = engine_of(layers=2, compile="blocks", dropout="none")
    assert [block._compiled_call_impl is not None for block in compiled.module.transformer.h] == [True, True]
    assert compiled.module._compiled_call_impl is None
    assert not compiled.is_compiled
    assert [name for name, _ in compiled.module.named_parameters()] == names
    torch._dynamo.utils.counters.clear()
    assert losses(compiled) == pytest.approx(expected, abs=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_the_whole_model_is_compiled(engine_of: Callable[..., deepspeed.DeepSpeedEngine]) -> None:
    assert not engine_of(layers=1).is_compiled
    engine = engine_of(layers=1, compile="model")
    assert engine.is_compiled
    assert engine.module._compiled_call_impl is not None
    assert engine.module.transformer.h[0]._compiled_call_impl is None


@pytest.mark.parametrize("multiple", [64, 128])
def test_padded_columns_leave_logits_loss_and_gradients(multiple: int) -> None:
    plain, padded = plain_model(), plain_model()
    padded.load_state_dict(plain.state_dict())
    apply_to_model(padded, {"padded_vocabulary": multiple})
    widths = []
    linear = torch.nn.functional.linear

    def watched(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        widths.append(weight.shape[0])
        return linear(input, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", watched)
        answers = [model(**batch()) for model in (plain, padded)]
    assert 512 in widths
    assert answers[1].logits.shape == answers[0].logits.shape == (2, 16, VOCABULARY)
    assert torch.allclose(answers[0].logits, answers[1].logits, atol=1e-6)
    assert answers[1].loss.item() == pytest.approx(answers[0].loss.item(), abs=1e-6)
    for answer in answers:
        answer.loss.backward()
    gradients = [dict(model.named_parameters()) for model in (plain, padded)]
    assert gradients[0].keys() == gradients[1].keys()
    for name, parameter in gradients[0].items():
        assert torch.allclose(parameter.grad, gradients[1][name].grad, atol=1e-6), name


@pytest.mark.parametrize("stage", [0, 3])
def test_the_padded_projection_is_in_the_engine_with_its_weight_tied(
    stage: int, engine_of: Callable[..., deepspeed.DeepSpeedEngine]
) -> None:
    expected = losses(engine_of(stage, dropout="none"))
    engine = engine_of(stage, padded_vocabulary=64, dropout="none")
    model = engine.module
    assert type(model.lm_head).__name__ == "PaddedLinear"
    assert model.lm_head.multiple == 64
    assert model.lm_head.weight is model.transformer.wte.weight
    assert engine(**batch()).logits.shape == (2, 16, VOCABULARY)
    assert losses(engine) == pytest.approx(expected, abs=1e-5)


def test_a_projection_with_a_bias_is_padded_too() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertForMaskedLM(config).eval()
    expected = model(**batch())
    apply_to_model(model, {"padded_vocabulary": 64})
    assert torch.allclose(model(**batch()).logits, expected.logits, atol=1e-6)


def test_attention_is_the_one_asked_for_and_the_caller_s_configuration_stays() -> None:
    given = model_config()
    before = copy.deepcopy(given.to_dict())
    found = {}
    for knobs in ({}, {"attention": "eager"}):
        ds_config = {"zero_optimization": {"stage": 0}}
        model = build_model(WORKLOAD, configure_model(given, knobs), ds_config, torch.device("cpu"))
        found[knobs.get("attention")] = model.config._attn_implementation
        assert {block.attn.config._attn_implementation for block in model.transformer.h} == {
            model.config._attn_implementation
        }
    assert found == {None: "sdpa", "eager": "eager"}
    assert given.to_dict() == before
    assert given._attn_implementation != "eager"


def test_eager_attention_is_in_the_engine(engine_of: Callable[..., deepspeed.DeepSpeedEngine]) -> None:
    assert engine_of(attention="eager").module.config._attn_implementation == "eager"


def test_without_dropout_every_probability_is_zero_and_the_caller_s_configuration_stays(
    engine_of: Callable[..., deepspeed.DeepSpeedEngine],
) -> None:
    def probabilities(model: torch.nn.Module) -> set[float]:
        return {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}

    given = model_config()
    configure_model(given, {"dropout": "none"})
    assert (given.resid_pdrop, given.embd_pdrop, given.attn_pdrop) == (0.1, 0.1, 0.1)
    assert probabilities(engine_of().module) == {0.1}
    engine = engine_of(dropout="none")
    assert probabilities(engine.module) == {0.0}
    assert engine.module.training
    assert engine(**batch()).loss.item() == engine(**batch()).loss.item()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_takes_the_place_of_fp16(stage: int, engine_of: Callable[..., deepspeed.DeepSpeedEngine]) -> None:
    engine = engine_of(stage, dtype="fp16", precision="bf16")
    assert engine.bfloat16_enabled() and not engine.fp16_enabled()
    assert {parameter.dtype for parameter in engine.module.parameters()} == {torch.bfloat16}
    before = losses(engine, 3)
    assert engine.skipped_steps == 0 and engine.global_steps == len(before)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("multiple", [64, 128])
def test_the_model_s_own_vocabulary_is_enlarged_and_the_caller_s_configuration_stays(
    stage: int, multiple: int, engine_of: Callable[..., deepspeed.DeepSpeedEngine]
) -> None:
    given = model_config()
    engine = engine_of(stage, described=given, vocabulary=multiple)
    assert given.vocab_size == engine.module.config.vocab_size - 11 == VOCABULARY
    assert engine.module.lm_head.weight is engine.module.transformer.wte.weight
    with deepspeed.zero.GatheredParameters(engine.module.lm_head.weight):
        assert engine.module.lm_head.weight.shape == (512, 32)
    assert engine(**batch()).logits.shape == (2, 16, 512)
    losses(engine, 1)


def test_deepcompile_is_in_the_engine_before_it_is_compiled(
    engine_of: Callable[..., deepspeed.DeepSpeedEngine],
) -> None:
    """To compile it takes CUDA: test_deepspeed_objective.py does."""
    for stage in (1, 2, 3):
        assert engine_of(stage, compile="deepcompile", begins=False).is_deepcompile_enabled()
    assert not engine_of(1, compile="model", begins=False).is_deepcompile_enabled()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_optimizer_is_on_the_host(stage: int, engine_of: Callable[..., deepspeed.DeepSpeedEngine]) -> None:
    expected = losses(engine_of(stage, dropout="none"))
    engine = engine_of(stage, offload_optimizer="cpu", dropout="none")
    found = engine.optimizer.offload_optimizer if stage == 3 else engine.optimizer.cpu_offload
    assert found and engine.zero_use_cpu_optimizer()
    pinned = "offload_optimizer_pin_memory" if stage == 3 else "cpu_offload_pin_memory"
    assert getattr(engine.optimizer, pinned)
    assert losses(engine) == pytest.approx(expected, abs=1e-5)


def test_parameters_are_on_the_host(engine_of: Callable[..., deepspeed.DeepSpeedEngine]) -> None:
    expected = losses(engine_of(3, dropout="none"))
    engine = engine_of(3, offload_parameters="cpu", dropout="none")
    optimizer = engine.optimizer
    assert optimizer.offload_param and optimizer.offload_param_pin_memory and not optimizer.offload_optimizer
    assert optimizer.parameter_offload.offload_device == "cpu"
    assert losses(engine) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_half_of_the_optimizer_is_on_the_host(
    engine_of: Callable[..., deepspeed.DeepSpeedEngine], compiled_adam: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an embedding large enough for two groups of parameters, and DeepSpeed's own Adam."""
    for name, value in compiled_adam.environment.items():
        monkeypatch.setenv(name, value)
    described = model_config(n_layer=1, n_embd=512, vocab_size=100_000)
    # As on a GPU: on a CPU ds-tune would ask for torch's Adam.
    engine = engine_of(3, described=described, device="cuda", offload_optimizer="cpu_half")
    assert engine.optimizer.partial_offload == engine.zero_partial_offload() == 0.5
    assert type(engine.basic_optimizer).__name__ == "DeepSpeedCPUAdam"
    assert type(engine.optimizer.backup_optimizer) is torch.optim.AdamW
    assert len(engine.optimizer.subgroup_to_device) == 2
    losses(engine, 1)


def test_weights_are_to_be_quantised_by_code_that_only_gpus_have(
    engine_of: Callable[..., deepspeed.DeepSpeedEngine],
) -> None:
    with pytest.raises(ValueError, match="not been implemented on CPU"):
        engine_of(3, quantized_weights="on")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_optimizer_is_torch_s_fused_one(stage: int, engine_of: Callable[..., deepspeed.DeepSpeedEngine]) -> None:
    for knobs, fused in (({}, None), ({"optimizer": "torch_fused"}, True)):
        engine = engine_of(stage, **knobs)
        assert type(engine.basic_optimizer) is torch.optim.AdamW
        assert engine.basic_optimizer.defaults["fused"] is fused
        assert all(group["fused"] is fused for group in engine.basic_optimizer.param_groups)
        losses(engine, 1)


def test_the_throughput_timer_runs_or_does_not(engine_of: Callable[..., deepspeed.DeepSpeedEngine]) -> None:
    for knobs, timed in (({}, True), ({"throughput_timer": "off"}, False)):
        losses(engine := engine_of(1, **knobs), 3)
        assert engine.tput_timer.config.synchronized and engine.tput_timer.config.enabled is timed
        assert (engine.tput_timer.total_elapsed_time > 0) is timed


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("value", "expected"), [("default", False), ("on", True), ("off", False)])
def test_communication_overlaps_as_asked(
    value: str, expected: bool, stage: int, engine_of: Callable[..., deepspeed.DeepSpeedEngine]
) -> None:
    engine = engine_of(stage, overlap_comm=value)
    assert engine.optimizer.overlap_comm is expected


@pytest.mark.parametrize(("value", "expected"), [("default", True), ("on", True), ("off", False)])
def test_zero_3_overlaps_communication_as_asked(
    value: str, expected: bool, engine_of: Callable[..., deepspeed.DeepSpeedEngine]
) -> None:
    assert engine_of(3, overlap_comm=value).zero_overlap_comm() is expected


@pytest.mark.parametrize("elements", KNOBS["bucket_elements"].values)
def test_buckets_have_the_size_asked_for(elements: int, engine_of: Callable[..., deepspeed.DeepSpeedEngine]) -> None:
    optimizer = engine_of(1, bucket_elements=elements).optimizer
    assert (optimizer.reduce_bucket_size, optimizer.allgather_bucket_size) == (elements, elements)


def test_zero_3_has_the_bucket_asked_for(engine_of: Callable[..., deepspeed.DeepSpeedEngine]) -> None:
    engine = engine_of(3, bucket_elements=50_000_000)
    assert engine.zero_reduce_bucket_size() == engine.optimizer.reduce_bucket_size == 50_000_000


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_are_contiguous_and_owned_in_turns_as_asked(
    stage: int, engine_of: Callable[..., deepspeed.DeepSpeedEngine]
) -> None:
    found = {}
    for field, value in (("contiguous_gradients", "off"), ("round_robin_gradients", "on"), ("dropout", "none")):
        engine = engine_of(stage, **{field: value})
        found[field] = (engine.optimizer.contiguous_gradients, engine.optimizer.round_robin_gradients)
        losses(engine, 1)
    assert found == {
        "contiguous_gradients": (False, False),
        "round_robin_gradients": (True, True),
        "dropout": (True, False),
    }


@pytest.mark.parametrize(
    ("field", "accessors"),
    [
        ("prefetch_elements", ["zero_prefetch_bucket_size"]),
        ("persistent_elements", ["zero_param_persistence_threshold"]),
        ("live_elements", ["zero_max_live_parameters", "zero_max_reuse_distance"]),
    ],
)
def test_zero_3_gathers_as_asked(
    field: str, accessors: list[str], engine_of: Callable[..., deepspeed.DeepSpeedEngine]
) -> None:
    plain = engine_of(3)
    value = KNOBS[field].values[0]
    engine = engine_of(3, **{field: value})
    for accessor in accessors:
        assert getattr(plain, accessor)() != value
        assert getattr(engine, accessor)() == value
    offload = engine.optimizer.parameter_offload
    assert {
        "prefetch_elements": offload._prefetch_bucket_sz,
        "persistent_elements": offload.param_numel_persistence_threshold,
        "live_elements": offload._max_available_parameters_in_numel,
    }[field] == value
    losses(engine, 1)


def unmarked() -> torch.nn.Module:
    """A model of nobody's: no block is marked, and its output projection is no plain one."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model.get_output_embeddings = lambda: model  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"compile": "blocks"}, "marks no repeating block in Sequential; leave compile=blocks out"),
        ({"activation_checkpointing": 1}, "Sequential has no activation checkpointing in transformers"),
        ({"padded_vocabulary": 64}, "Sequential has no plain output projection; leave padded_vocabulary out"),
    ],
)
def test_a_model_that_cannot_do_what_a_knob_asks_is_told_in_one_sentence(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as raised:
        apply_to_model(unmarked(), knobs)
    assert "\n" not in str(raised.value)
