"""Changes to a language model's output projection: columns padded, or the loss taken without all logits at once.

The projection's class is changed and not the module, so that its parameter (tied or not), names and hooks stay. Under
ZeRO-3 the hooks around its forward pass gather the weight, once, for all that happens within.
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.knobs import HEAD_THEN_LOSS, LOSS_CHUNKS

NOT_A_TARGET = -100
"""The label of a token that has no loss, in transformers and torch."""


class PaddedLinear(torch.nn.Linear):
    """A linear layer that computes with its columns padded to a multiple, and gives back those that were asked for.

    Matrix units need sizes that are multiples of 64 or so; GPT-2's 50257 columns take the slow path without it.
    """

    multiple: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        missing = -self.weight.shape[0] % self.multiple
        weight = torch.nn.functional.pad(self.weight, (0, 0, 0, missing))
        bias = torch.nn.functional.pad(self.bias, (0, missing)) if self.bias is not None else None
        return torch.nn.functional.linear(input, weight, bias)[..., : self.weight.shape[0]]


class LossLinear(torch.nn.Linear):
    """A projection that gives the mean loss in place of the logits when it was told the labels."""

    labels: torch.Tensor | None = None
    """Labels of the next forward pass, of shape (samples, seq_len)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        labels, self.labels = self.labels, None
        if labels is None:
            return self.logits(input)
        # Each token predicts the next, as in transformers' ForCausalLMLoss.
        following = torch.nn.functional.pad(labels, (0, 1), value=NOT_A_TARGET)[:, 1:]
        return self.loss(input.flatten(0, 1), following.flatten())

    def logits(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input)

    def loss(self, input: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of inputs (tokens, hidden) and labels (tokens,): the mean over the tokens that have a label, in fp32."""
        raise NotImplementedError


class ChunkedLoss(LossLinear):
    """Makes the logits of some tokens, takes their loss and forgets them; the backward pass makes them again.

    Torch's own linear_cross_entropy takes the gradients in the forward pass, before they are lifted by the loss scale
    into what fp16 can hold.
    """

    def loss(self, input: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        def summed(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            logits = self.logits(tokens).float()
            return torch.nn.functional.cross_entropy(logits, targets, ignore_index=NOT_A_TARGET, reduction="sum")

        losses = [
            checkpoint(summed, tokens, targets, use_reentrant=False, preserve_rng_state=False)
            for tokens, targets in zip(input.chunk(LOSS_CHUNKS), labels.chunk(LOSS_CHUNKS), strict=True)
        ]
        return torch.stack(losses).sum() / (labels != NOT_A_TARGET).sum()


class PaddedChunkedLoss(ChunkedLoss, PaddedLinear):
    """Linear layer with padded columns."""


class LigerLoss(LossLinear):
    """The fused kernels of liger-kernel, which choose their pieces themselves."""

    def loss(self, input: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

        fused = LigerFusedLinearCrossEntropyLoss(ignore_index=NOT_A_TARGET)
        found: torch.Tensor = fused(self.weight, input, labels, self.bias)
        return found


LOSSES: dict[tuple[str, type[torch.nn.Module]], type[LossLinear]] = {
    ("chunked", torch.nn.Linear): ChunkedLoss,
    ("chunked", PaddedLinear): PaddedChunkedLoss,
    ("liger", torch.nn.Linear): LigerLoss,
}
"""By the knob's value and what the projection is."""


def pad_output_projection(model: torch.nn.Module, multiple: int) -> None:
    """Pads the model's output projection.

    Raises:
        UsageError: the model has no plain output projection.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not torch.nn.Linear:
        raise UsageError(f"{type(model).__name__} has no plain output projection; leave padded_vocabulary out")
    head.__class__ = PaddedLinear
    head.multiple = multiple  # type: ignore[assignment]


def take_loss_in_projection(model: torch.nn.Module, way: str) -> None:
    """Has the output projection take the loss, `chunked` or by `liger`; the model then gives that in place of logits.

    Raises:
        UsageError: the model does more between its projection and its loss, or liger-kernel is not installed.
    """
    if getattr(model.config, "model_type", None) not in HEAD_THEN_LOSS:
        raise UsageError(
            f"{type(model).__name__} is none of the models whose loss can be taken in its output projection "
            f"({', '.join(HEAD_THEN_LOSS)}); leave loss_computation={way} out"
        )
    head = model.get_output_embeddings()  # type: ignore[operator]
    if (way, type(head)) not in LOSSES:
        raise UsageError(f"loss_computation={way} cannot be combined with padded_vocabulary; leave one of them out")
    if way == "liger" and importlib.util.find_spec("liger_kernel") is None:
        raise UsageError("loss_computation=liger needs the package liger-kernel, which is not installed")
    head.__class__ = LOSSES[way, type(head)]

    plain_loss: Callable[..., torch.Tensor] = model.loss_function  # type: ignore[assignment]

    def tell_labels(module: torch.nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        head.labels = named.get("labels") if module.training else None

    def as_projected(logits: torch.Tensor, labels: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        if logits.dim() > 0:  # in evaluation
            return plain_loss(logits, labels, *more, **named)
        items: torch.Tensor | int | None = named.get("num_items_in_batch")
        if items is None:
            return logits
        # transformers' Trainer divides by the targets of all micro-batches of a step.
        return logits * (labels[:, 1:] != NOT_A_TARGET).sum() / items

    model.register_forward_pre_hook(tell_labels, with_kwargs=True)
    model.loss_function = as_projected  # type: ignore[assignment]
