"""Weights made quickly are like those that torch draws, until training begins."""

from collections.abc import Iterator

import deepspeed
import pytest
import torch

from ds_tune.objectives.rank.script.quick_weights import BLOCK_ELEMENTS, make_weights_quickly


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for owner, name in ((torch.Tensor, "normal_"), (torch.Tensor, "uniform_"), (deepspeed, "initialize")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # is put back
    make_weights_quickly()
    yield


def test_large_tensors_have_the_spread_that_was_asked_for_and_no_repeated_rows() -> None:
    weight = torch.nn.Parameter(torch.empty(1600, 1600))
    assert torch.nn.init.normal_(weight, mean=1.0, std=0.02) is weight
    assert weight.requires_grad
    assert float(weight.detach().mean()) == pytest.approx(1.0, abs=1e-3)
    assert float(weight.detach().std()) == pytest.approx(0.02, rel=1e-2)
    assert len(torch.unique(weight.detach()[:, 0])) > 1500
    assert torch.equal(weight.detach().view(-1)[:1000], weight.detach().view(-1)[BLOCK_ELEMENTS:][:1000])
    torch.nn.init.kaiming_uniform_(weight, a=5**0.5)
    assert float(weight.detach().abs().max()) == pytest.approx(1600**-0.5, rel=1e-2)


def test_small_tensors_are_drawn_by_torch() -> None:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.empty(100).normal_(generator=generator)
    assert torch.equal(drawn, torch.randn(100, generator=generator.manual_seed(3)))


def test_training_draws_as_it_does_without_ds_tune() -> None:
    with pytest.raises(AssertionError):  # DeepSpeed's own: there is no model
        deepspeed.initialize(model=None, config={})
    noise = torch.empty(2 * BLOCK_ELEMENTS).normal_()
    assert not torch.equal(noise[:1000], noise[BLOCK_ELEMENTS:][:1000])
