"""One trial on this rank: configuration, model, engine, warm-up, timed steps."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

import datasets
import deepspeed
import torch
import transformers

from objectives.deadlines import BUILD_SECONDS, predicted_step_seconds, timed_deadline, warmup_deadline
from objectives.ds_config import deepspeed_config
from objectives.machine import Machine
from objectives.rank.data import batches
from objectives.rank.device import Meter
from objectives.rank.distributed import slowest
from objectives.rank.model import build_model, count_parameters, flops_per_sample
from objectives.rank.progress import Progress
from objectives.timing import StepPlan
from objectives.trial import TrialConfig
from objectives.workload import Workload

MAX_SKIPPED_STEPS = 24
"""fp16's dynamic loss scale halves at each overflow; from 2^16 it cannot halve more often and still be one."""


class OverflowedError(RuntimeError):
    """Every step overflowed, so no whole optimizer step could be timed."""


def run_trial(
    config: TrialConfig,
    *,
    seconds_per_sample: float | None,
    workload: Workload,
    machine: Machine,
    model_config: transformers.PretrainedConfig,
    blocks: datasets.Dataset,
    plan: StepPlan,
    device: torch.device,
    meter: Meter,
    progress: Progress,
    engines: list[deepspeed.DeepSpeedEngine],
) -> dict[str, Any]:
    """Trains with one configuration and times it.

    Args:
        seconds_per_sample: the slowest that a trial of this study took so far, to know what hangs; None before any.
        engines: the engine is put here as soon as it exists, for the caller to release however the trial ends.

    Returns:
        This rank's result document; `objectives.deepspeed_objective.combine_ranks` reads it.
    """
    started = time.perf_counter()
    rank = torch.distributed.get_rank()
    progress.announce("config", seconds=BUILD_SECONDS["config"])
    ds_config = deepspeed_config(config, workload, ranks=machine.ranks, device=machine.device)
    deepspeed.DeepSpeedConfig(ds_config)  # a mistake is found here, before a model is built
    progress.announce("model", seconds=BUILD_SECONDS["model"])
    model = build_model(workload, model_config, ds_config, device)
    parameters = count_parameters(model)
    progress.announce("engine", seconds=BUILD_SECONDS["engine"])
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds_config)
    engines.append(engine)
    progress.enter("data")
    micro_batches = batches(blocks, config.micro_batch_size, rank=rank, ranks=machine.ranks, pin=device.type == "cuda")
    steps = StepTimer(engine, micro_batches, config.gradient_accumulation_steps, device, meter, progress)
    setup_seconds = time.perf_counter() - started

    flops = flops_per_sample(model_config, parameters, workload.seq_len)
    predicted = predicted_step_seconds(
        samples=config.micro_batch_size * config.gradient_accumulation_steps,
        seconds_per_sample=seconds_per_sample,
        flops_per_sample=flops,
        device=machine.device,
    )
    warmup_steps = plan.warmup(config.zero_stage)
    progress.announce("warm-up", seconds=warmup_deadline(predicted, warmup_steps))
    warmup = steps.run(warmup_steps)
    step_seconds = slowest(warmup["step_seconds"][-1], device)
    timed_steps = plan.timed(step_seconds)
    progress.announce("timed steps", seconds=timed_deadline(step_seconds, timed_steps))
    timed = steps.run(timed_steps)
    return {
        **timed,
        "warmup_step_seconds": warmup["step_seconds"],
        "skipped_steps": warmup["skipped_steps"] + timed["skipped_steps"],
        "deepspeed_samples_per_second": _deepspeed_rate(engine),
        "peak_memory_bytes": meter.peak_memory_bytes(),
        "reserved_memory_bytes": meter.reserved_memory_bytes(),
        "alloc_retries": meter.alloc_retries(),
        "setup_seconds": setup_seconds,
        "model_parameters": parameters,
        "flops_per_sample": flops,
    }


class StepTimer:
    """Runs whole optimizer steps back to back, as training does, and reads their times afterwards."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        micro_batches: Iterator[dict[str, torch.Tensor]],
        gradient_accumulation_steps: int,
        device: torch.device,
        meter: Meter,
        progress: Progress,
    ) -> None:
        self._engine = engine
        self._micro_batches = micro_batches
        self._gradient_accumulation_steps = gradient_accumulation_steps
        self._device = device
        self._meter = meter
        self._progress = progress

    def run(self, steps: int) -> dict[str, Any]:
        """Runs until `steps` optimizer steps were not skipped, and returns their times.

        A step that fp16 overflow skipped has no optimizer in it; it is run, counted and left out.

        Raises:
            OverflowedError: the loss scale never settled.
        """
        meter = self._meter
        meter.synchronize()
        torch.distributed.barrier()
        boundaries = [meter.mark()]
        parts: list[list[tuple[Any, Any, Any, Any]]] = []
        whole: list[bool] = []
        while whole.count(True) < steps:
            skipped_before = self._engine.skipped_steps
            parts.append([self._micro_step() for _ in range(self._gradient_accumulation_steps)])
            boundaries.append(meter.mark())
            whole.append(self._engine.skipped_steps == skipped_before)
            if whole.count(False) > MAX_SKIPPED_STEPS:
                raise OverflowedError(f"{MAX_SKIPPED_STEPS} steps overflowed in fp16; try bf16 or a lower loss scale")
        meter.synchronize()
        seconds = [meter.seconds(start, end) for start, end in itertools.pairwise(boundaries)]
        spans = [
            [sum(meter.seconds(marks[part], marks[part + 1]) for marks in step) for part in range(3)] for step in parts
        ]
        kept = [index for index, is_whole in enumerate(whole) if is_whole]
        forward, backward, optimizer = (sum(spans[index][part] for index in kept) / len(kept) for part in range(3))
        return {
            "step_seconds": [seconds[index] for index in kept],
            "forward_seconds": forward,
            "backward_seconds": backward,
            "optimizer_seconds": optimizer,
            "skipped_steps": whole.count(False),
        }

    def _micro_step(self) -> tuple[Any, Any, Any, Any]:
        """One forward, backward and engine step; the marks around them."""
        progress, meter = self._progress, self._meter
        progress.enter("data")
        batch = {key: tensor.to(self._device, non_blocking=True) for key, tensor in next(self._micro_batches).items()}
        before = meter.mark()
        progress.enter("forward")
        loss = self._engine(**batch).loss
        after_forward = meter.mark()
        progress.enter("backward")
        self._engine.backward(loss)
        after_backward = meter.mark()
        progress.enter("step")
        self._engine.step()
        return before, after_forward, after_backward, meter.mark()


def _deepspeed_rate(engine: deepspeed.DeepSpeedEngine) -> float | None:
    """The running average of DeepSpeed's ThroughputTimer; None where the user switched it off."""
    timer = engine.tput_timer
    if timer.global_step_count <= timer.start_step or timer.total_elapsed_time <= 0:
        return None
    return float(timer.avg_samples_per_sec())
