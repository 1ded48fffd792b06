"""Training without DeepSpeed, as Hugging Face's Trainer does it by default, with the members of DeepSpeed's engine.

Parameters and AdamW's states are fp32 on every rank, and torch's DistributedDataParallel averages gradients. Mixed
precision is autocast, in fp16 with a GradScaler. Clipping and AdamW's settings are those that DeepSpeed would be given.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from ds_tune.objectives.ds_config import LEARNING_RATE, deepspeed_config
from ds_tune.objectives.rank.engine import EngineSlot
from ds_tune.objectives.rank.knobs import configure_model
from ds_tune.objectives.rank.model import TORCH_DTYPES, build_model, count_parameters
from ds_tune.objectives.rank.resources import RankResources
from ds_tune.objectives.timing.deadlines import BUILD_SECONDS
from ds_tune.objectives.trial import TrialConfig

ADAM_SETTINGS = ("lr", "betas", "eps", "weight_decay")
"""Keys of DeepSpeed's `optimizer.params` that mean the same to torch's AdamW."""


class VanillaEngine:
    """Model, optimizer and precision without DeepSpeed, with the members of its engine that `TrainingLoop` uses."""

    def __init__(
        self,
        model: torch.nn.Module,
        device: torch.device,
        *,
        dtype: str,
        ranks: int,
        gradient_accumulation_steps: int,
        adam: Mapping[str, Any],
        gradient_clipping: float,
    ) -> None:
        """
        Args:
            model: its parameters in fp32, on the device.
            dtype: `fp16`, `bf16` or `fp32`: what autocast computes in.
            adam: settings of AdamW, some of `ADAM_SETTINGS`.
            gradient_clipping: largest norm of all gradients; 0 for any.
        """
        self.skipped_steps = 0
        self._device, self._dtype = device, dtype
        self._accumulation, self._clipping = gradient_accumulation_steps, gradient_clipping
        self._micro_steps = 0  # of the optimizer step that is under way
        self._is_boundary: bool | None = None
        self._model: Any = model
        if ranks > 1:  # one process has nobody to average with, and Trainer leaves the model as it is
            ids = [device.index] if device.type == "cuda" else None
            self._model = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)
        on_gpu = device.type == "cuda"
        self._optimizer: Any = torch.optim.AdamW(model.parameters(), fused=on_gpu or None, **adam)
        self._scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")

    @property
    def _closes_step(self) -> bool:
        return self._micro_steps + 1 == self._accumulation if self._is_boundary is None else self._is_boundary

    def __call__(self, **batch: torch.Tensor) -> Any:
        """Output of the model for a micro-batch, its loss among it."""
        alone = not self._closes_step and isinstance(self._model, torch.nn.parallel.DistributedDataParallel)
        autocast = torch.autocast(
            self._device.type,
            dtype=TORCH_DTYPES[self._dtype] if self._dtype != "fp32" else None,
            enabled=self._dtype != "fp32",
        )
        # Gradients are averaged once a step: DDP decides in the forward pass whether the backward pass does it.
        with self._model.no_sync() if alone else contextlib.nullcontext(), autocast:
            return self._model(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        scaled: Any = self._scaler.scale(loss / self._accumulation)
        scaled.backward()

    def step(self) -> None:
        """Ends a micro-step; the last one of an optimizer step updates the parameters."""
        if not self._closes_step:
            self._micro_steps += 1
            return
        self._micro_steps = 0
        if self._clipping > 0:
            self._scaler.unscale_(self._optimizer)
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clipping)
        before = self._scaler.get_scale()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self.skipped_steps += self._scaler.get_scale() < before  # as Accelerate tells it
        self._optimizer.zero_grad(set_to_none=True)

    def gradient_accumulation_steps(self) -> int:
        return self._accumulation

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Says whether the micro-step that begins is the last one of its optimizer step, from now on each time."""
        self._is_boundary = is_boundary

    def destroy(self) -> None:
        """Lets go of all that takes memory."""
        self._model = self._optimizer = None


def build_vanilla_engine(
    config: TrialConfig, rank: RankResources, slot: EngineSlot, *, knobs: Mapping[str, Any] | None = None
) -> tuple[VanillaEngine, int]:
    """Returns the engine that trains on a configuration's batch sizes without DeepSpeed, and the model's parameters.

    Args:
        knobs: knobs of the model, of which the configuration has none here.
    """
    ds_config = deepspeed_config(config, rank.workload, ranks=rank.machine.ranks, device=rank.machine.device)
    rank.progress.announce("model", seconds=BUILD_SECONDS["model"])
    whole_in_fp32 = {"zero_optimization": {"stage": 0}}
    model = build_model(rank.workload, configure_model(rank.model_config, knobs or {}), whole_in_fp32, rank.device)
    parameters = count_parameters(model)
    rank.progress.announce("engine", seconds=BUILD_SECONDS["engine"])
    engine = VanillaEngine(
        model,
        rank.device,
        dtype=rank.workload.dtype,
        ranks=rank.machine.ranks,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        adam=adam_settings(ds_config),
        gradient_clipping=float(ds_config["gradient_clipping"]),
    )
    slot.engine = engine
    return engine, parameters


def adam_settings(ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of torch's AdamW for what a DeepSpeed configuration says of its optimizer.

    DeepSpeed's AdamW has a weight decay of 0 where nothing is said, torch's 0.01.
    """
    params = ds_config.get("optimizer", {}).get("params", {})
    return {"lr": LEARNING_RATE, "weight_decay": 0.0, **{key: params[key] for key in ADAM_SETTINGS if key in params}}
