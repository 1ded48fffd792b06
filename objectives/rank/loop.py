"""The training loop of built-in models: optimizer steps, back to back, as a person's own loop would take them."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

Batch = dict[str, torch.Tensor]


class TrainingEngine(Protocol):
    """Members of DeepSpeed's engine that a loop uses."""

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that fp16 overflow skipped."""

    def __call__(self, **batch: torch.Tensor) -> Any: ...

    def backward(self, loss: torch.Tensor) -> object: ...

    def step(self) -> object: ...

    def gradient_accumulation_steps(self) -> int: ...

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> object: ...


def nothing() -> None:
    """For whoever doesn't listen."""


class TrainingLoop:
    """Optimizer steps of an engine on a stream of micro-batches."""

    def __init__(
        self,
        engine: TrainingEngine,
        micro_batches: Iterator[Batch],
        device: torch.device,
        *,
        enter: Callable[[str], None] = lambda part: None,
        micro_step_done: Callable[[], None] = nothing,
        on_loss: Callable[[torch.Tensor], object] | None = None,
        on_batch: Callable[[Batch], object] | None = None,
    ) -> None:
        """
        Args:
            enter: told which part of a micro-step begins: data, forward, backward or step.
            micro_step_done: told when a micro-step has ended.
            on_loss: given the loss of each micro-batch, on the device.
            on_batch: given each micro-batch, on the host.
        """
        self._engine = engine
        self._micro_batches = micro_batches
        self._device = device
        self._enter = enter
        self._micro_step_done = micro_step_done
        self._on_loss = on_loss
        self._on_batch = on_batch

    def step(self, micro_steps: int | None = None) -> bool:
        """Takes one optimizer step.

        Args:
            micro_steps: micro-steps after which the step is closed; None to leave that to DeepSpeed, which closes it
                after as many as gradients accumulate over.

        Returns:
            Whether fp16 overflow skipped it.
        """
        skipped_before = self._engine.skipped_steps
        count = self._engine.gradient_accumulation_steps() if micro_steps is None else micro_steps
        for left in reversed(range(count)):
            if micro_steps is not None:
                self._engine.set_gradient_accumulation_boundary(left == 0)
            self._micro_step()
        return bool(self._engine.skipped_steps != skipped_before)

    def _micro_step(self) -> None:
        self._enter("data")
        on_host = next(self._micro_batches)
        if self._on_batch is not None:
            self._on_batch(on_host)
        batch = {key: tensor.to(self._device, non_blocking=True) for key, tensor in on_host.items()}
        self._enter("forward")
        loss = self._engine(**batch).loss
        if self._on_loss is not None:
            self._on_loss(loss.detach())
        self._enter("backward")
        self._engine.backward(loss)
        self._enter("step")
        self._engine.step()
        self._micro_step_done()
