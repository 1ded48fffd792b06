"""Torch's attention kernels as the knob asks for them: what is looked at is the operations that run."""

import importlib.util
from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

FLASH, ITS_BACKWARD = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)


class Operations(TorchDispatchMode):
    """Counts what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(501, (2, 16), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def operations_of(engine: deepspeed.DeepSpeedEngine) -> tuple[dict[str, int], float]:
    """Of a forward and a backward pass, and its loss."""
    with Operations() as seen:
        loss = engine(**batch()).loss
        engine.backward(loss)
    return seen.counts, loss.item()


@pytest.mark.parametrize("every", [0, 1])
def test_the_kernel_asked_for_runs_also_when_a_block_is_computed_again(
    every: int, engine_of: Callable[..., deepspeed.DeepSpeedEngine]
) -> None:
    knobs = {"layers": 2, "dropout": "none", "activation_checkpointing": every}
    flash, expected = operations_of(engine_of(attention="sdpa_flash", **knobs))
    assert (flash[FLASH], flash[ITS_BACKWARD]) == (2 * (1 + every), 2)
    math, loss = operations_of(engine_of(attention="sdpa_math", **knobs))
    assert FLASH not in math and ITS_BACKWARD not in math
    assert math["bmm"] > flash.get("bmm", 0)
    assert loss == pytest.approx(expected, abs=1e-5)


def test_the_kernel_leaves_attention_causal_without_a_mask(
    engine_of: Callable[..., deepspeed.DeepSpeedEngine],
) -> None:
    expected = [engine_of(layers=1, dropout="none")(**batch()).loss.item()]
    for kernel in ("sdpa_flash", "sdpa_math"):
        engine = engine_of(layers=1, dropout="none", attention=kernel)
        assert engine(**batch()).loss.item() == pytest.approx(expected[0], abs=1e-5)
    # A later token changes nothing of an earlier one's logits.
    ids = batch()["input_ids"]
    other = torch.cat([ids[:, :8], (ids[:, 8:] + 1) % 501], dim=1)
    assert torch.allclose(engine(input_ids=ids).logits[:, :8], engine(input_ids=other).logits[:, :8], atol=1e-5)


def test_a_model_whose_heads_share_keys_runs_with_a_kernel_too(
    engine_of: Callable[..., deepspeed.DeepSpeedEngine],
) -> None:
    config = transformers.LlamaConfig(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
        vocab_size=501, use_cache=False,
    )  # fmt: skip
    counts, _ = operations_of(engine_of(described=config, attention="sdpa_flash"))
    assert counts[FLASH] == 1


def test_a_kernel_that_cannot_run_here_is_not_quietly_another(
    engine_of: Callable[..., deepspeed.DeepSpeedEngine],
) -> None:
    """What the space does not offer, a person may still ask for by hand."""
    engine = engine_of(layers=1, attention="sdpa_cudnn")
    with pytest.raises(RuntimeError, match=r"No (available kernel|viable backend)"):
        engine(**batch())


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_flashattentions_own_package_is_asked_for_by_transformers(
    engine_of: Callable[..., deepspeed.DeepSpeedEngine],
) -> None:
    with pytest.raises(ImportError, match="package for FlashAttention2 doesn't seem to be installed"):
        engine_of(layers=1, attention="flash_attention_2")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kernel", "operation"),
    [
        ("sdpa_flash", "_scaled_dot_product_flash_attention"),
        ("sdpa_efficient", "_scaled_dot_product_efficient_attention"),
        ("sdpa_cudnn", "_scaled_dot_product_cudnn_attention"),
    ],
)
def test_each_kernel_runs_on_a_gpu(kernel: str, operation: str) -> None:
    from ds_tune.objectives.rank.knobs import configure_model

    config = transformers.GPT2Config(n_layer=1, n_embd=128, n_head=2, n_positions=64, vocab_size=501, use_cache=False)
    model = transformers.GPT2LMHeadModel(configure_model(config, {"attention": kernel})).half().cuda()
    ids = torch.randint(501, (2, 64), device="cuda")
    with Operations() as seen:
        model(input_ids=ids, labels=ids).loss.backward()
    assert seen.counts[operation] == 1


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")
def test_flashattentions_own_package_computes_what_torchs_kernel_does() -> None:
    from ds_tune.objectives.rank.knobs import configure_model

    ids = torch.randint(501, (2, 64), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    found = []
    for attention in ("sdpa_flash", "flash_attention_2"):
        config = transformers.GPT2Config(
            n_layer=2, n_embd=128, n_head=2, n_positions=64, vocab_size=501, use_cache=False,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(configure_model(config, {"attention": attention})).half().cuda()
        with Operations() as seen:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        found.append((loss, model.transformer.wte.weight.grad))
    assert not any("scaled_dot_product" in operation for operation in seen.counts)
    (one, its_gradient), (other, their_gradient) = found
    assert other.item() == pytest.approx(one.item(), rel=1e-3)
    assert torch.allclose(its_gradient, their_gradient, rtol=1e-2, atol=1e-3)
