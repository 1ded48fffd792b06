"""The loss taken in the output projection: the same numbers, and never all logits at once."""

import importlib.util
from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.knobs import HEAD_THEN_LOSS, LOSS_CHUNKS
from ds_tune.objectives.rank.knobs import apply_to_model

VOCABULARY, TOKENS = 501, 2 * 16

SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 16, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
             "attn_pdrop": 0.0},
    **{name: {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
              "intermediate_size": 32, "head_dim": 16} for name in HEAD_THEN_LOSS if name != "gpt2"},
}  # fmt: skip


def described(family: str, **fields: Any) -> transformers.PretrainedConfig:
    sizes = {**SIZES[family], "vocab_size": VOCABULARY, "use_cache": False, **fields}
    return transformers.AutoConfig.for_model(family, **sizes)


def model_of(family: str, dtype: torch.dtype = torch.float32, **fields: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(described(family, **fields), dtype=dtype)
    return model.train()


def batch(ignored: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :ignored] = -100
    return {"input_ids": ids, "labels": labels}


def losses(engine: deepspeed.DeepSpeedEngine, steps: int = 3) -> list[float]:
    found = []
    for _ in range(steps):
        loss = engine(**batch()).loss
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", HEAD_THEN_LOSS)
@pytest.mark.parametrize("padded", [0, 64])
def test_a_loss_in_chunks_and_its_gradients_are_the_plain_ones(family: str, tied: bool, padded: int) -> None:
    plain, chunked = (model_of(family, tie_word_embeddings=tied) for _ in range(2))
    chunked.load_state_dict(plain.state_dict())
    apply_to_model(chunked, {"loss_computation": "chunked", "padded_vocabulary": padded})
    for ignored in (0, 5):
        answers = [model(**batch(ignored)) for model in (plain, chunked)]
        assert answers[1].loss.item() == pytest.approx(answers[0].loss.item(), abs=1e-6)
        for answer in answers:
            answer.loss.backward()
        gradients = [dict(model.named_parameters()) for model in (plain, chunked)]
        assert gradients[0].keys() == gradients[1].keys()
        for name, parameter in gradients[0].items():
            assert torch.allclose(parameter.grad, gradients[1][name].grad, atol=1e-6), name


def test_without_labels_there_are_logits_as_ever() -> None:
    plain, chunked = model_of("gpt2"), model_of("gpt2")
    apply_to_model(chunked, {"loss_computation": "chunked"})
    chunked(**batch())
    ids = {"input_ids": batch()["input_ids"]}
    assert torch.equal(chunked(**ids).logits, plain(**ids).logits)


def test_no_tensor_ever_has_all_logits() -> None:
    plain, chunked = model_of("gpt2", n_embd=64), model_of("gpt2", n_embd=64)
    apply_to_model(chunked, {"loss_computation": "chunked"})

    def most_tokens(model: torch.nn.Module) -> int:
        most = 0

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                nonlocal most
                found = func(*args, **(kwargs or {}))
                if isinstance(found, torch.Tensor) and found.dim() > 1 and found.shape[-1] == VOCABULARY:
                    tokens = found.numel() // VOCABULARY
                    most = max(most, tokens if tokens != 64 else 0)  # 64 rows: the weight itself, transposed
                return found

        with Watch():
            model(**batch()).loss.backward()
        return most

    assert most_tokens(plain) == TOKENS
    assert most_tokens(chunked) == TOKENS // LOSS_CHUNKS


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("padded", [0, 64])
@pytest.mark.parametrize("every", [0, 1])
def test_the_engine_trains_alike_with_its_loss_in_chunks(
    stage: int, padded: int, every: int, engine_of: Callable[..., deepspeed.DeepSpeedEngine]
) -> None:
    expected = losses(engine_of(stage, layers=2, dropout="none"))
    engine = engine_of(
        stage,
        layers=2,
        dropout="none",
        loss_computation="chunked",
        padded_vocabulary=padded,
        activation_checkpointing=every,
    )
    head = engine.module.lm_head
    assert type(head).__name__ == ("PaddedChunkedLoss" if padded else "ChunkedLoss")
    assert head.weight is engine.module.transformer.wte.weight
    assert losses(engine) == pytest.approx(expected, abs=1e-5)


def test_in_half_precision_the_loss_is_still_taken_in_fp32(
    engine_of: Callable[..., deepspeed.DeepSpeedEngine],
) -> None:
    expected = losses(engine_of(1, dtype="bf16", dropout="none"))
    engine = engine_of(1, dtype="bf16", dropout="none", loss_computation="chunked")
    assert engine(**batch()).loss.dtype is torch.float32
    assert losses(engine) == pytest.approx(expected, rel=2e-3)


def test_small_gradients_survive_fp16_under_a_loss_scale() -> None:
    """Which is why the gradients are not taken in the forward pass."""
    scale = 2.0**16
    grads = []
    for knobs in ({}, {"loss_computation": "chunked"}):
        model = model_of("gpt2", torch.float16)
        apply_to_model(model, knobs)
        # What a batch of a thousand times as many tokens would leave of each gradient.
        (model(**batch()).loss * (scale / 4096)).backward()
        grads.append(model.transformer.h[0].mlp.c_fc.weight.grad.float() / scale)
    assert (grads[0] != 0).float().mean() > 0.9
    assert torch.allclose(grads[0], grads[1], rtol=0.05, atol=float(grads[0].abs().max()) * 0.02)


def test_a_model_that_changes_its_logits_before_the_loss_is_refused() -> None:
    """Gemma 2 caps its logits; a loss would be capped in their place."""
    config = transformers.Gemma2Config(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
        head_dim=16, vocab_size=VOCABULARY,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UsageError, match="Gemma2ForCausalLM is none of the models whose loss can be taken"):
        apply_to_model(model, {"loss_computation": "chunked"})


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        (
            {"loss_computation": "liger", "padded_vocabulary": 64},
            "loss_computation=liger cannot be combined with padded_vocabulary",
        ),
        ({"loss_computation": "liger"}, "loss_computation=liger needs the package liger-kernel"),
    ],
)
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is not None, reason="liger-kernel is installed")
def test_liger_is_refused_where_it_cannot_be(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        apply_to_model(model_of("gpt2"), knobs)


@pytest.mark.gpu
def test_ligers_loss_and_gradients_are_the_plain_ones() -> None:
    pytest.importorskip("liger_kernel")
    plain, fused = (model_of("gpt2").cuda() for _ in range(2))
    apply_to_model(fused, {"loss_computation": "liger"})
    answers = [model(**{key: value.cuda() for key, value in batch(5).items()}) for model in (plain, fused)]
    assert answers[1].loss.item() == pytest.approx(answers[0].loss.item(), abs=1e-4)
    for answer in answers:
        answer.loss.backward()
    for (name, one), (_, other) in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-3), name
