"""The engine that trains without DeepSpeed, in this process: what fp16 overflow does, and what it takes over."""

from types import SimpleNamespace

import pytest
import torch

from ds_tune.objectives.rank.vanilla import VanillaEngine, adam_settings


class Scaled(torch.nn.Module):
    """Model of one weight whose loss is that times what it is fed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, factor: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.weight * factor).sum())


def engine_of(model: Scaled, *, dtype: str = "fp16", accumulation: int = 1, clipping: float = 0.0) -> VanillaEngine:
    return VanillaEngine(
        model,
        torch.device("cpu"),
        dtype=dtype,
        ranks=1,
        gradient_accumulation_steps=accumulation,
        adam={"lr": 0.5, "weight_decay": 0.0},
        gradient_clipping=clipping,
    )


def train(engine: VanillaEngine, factor: float) -> None:
    engine.backward(engine(factor=torch.tensor([factor])).loss)
    engine.step()


def test_step_that_overflows_in_fp16_is_skipped_and_counted() -> None:
    model = Scaled()
    engine = engine_of(model, clipping=1.0)
    train(engine, float("inf"))
    assert engine.skipped_steps == 1
    assert model.weight.item() == 1.0
    train(engine, 2.0)
    assert engine.skipped_steps == 1
    assert model.weight.item() == pytest.approx(0.5)


def test_parameters_move_only_with_the_last_micro_step() -> None:
    model = Scaled()
    engine = engine_of(model, dtype="fp32", accumulation=2)
    for _ in range(2):  # two optimizer steps
        before = model.weight.item()
        train(engine, 3.0)
        assert model.weight.item() == before
        train(engine, 1.0)
        assert model.weight.item() < before


def test_gradient_is_the_mean_over_micro_steps() -> None:
    model = Scaled()
    engine = engine_of(model, dtype="fp32", accumulation=2)
    train(engine, 3.0)
    assert model.weight.grad is not None and model.weight.grad.item() == pytest.approx(1.5)


def test_settings_of_adam_are_those_that_deepspeed_would_have() -> None:
    params = {"lr": 1e-3, "betas": [0.9, 0.95], "torch_adam": True}
    settings = adam_settings({"optimizer": {"type": "AdamW", "params": params}})
    assert settings == {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.0}
