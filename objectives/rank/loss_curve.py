"""The losses of some optimizer steps on this rank, for `objectives.numerics`."""

import itertools
import math
from typing import Any

import datasets
import deepspeed
import torch
import transformers

from ds_tune.objectives.machine import Machine
from ds_tune.objectives.rank.data import collate
from ds_tune.objectives.rank.model import flops_per_sample
from ds_tune.objectives.rank.progress import Progress
from ds_tune.objectives.rank.training import MAX_SKIPPED_STEPS, OverflowedError, build_engine
from ds_tune.objectives.timing.deadlines import predicted_step_seconds, warmup_deadline
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.huggingface import Workload


def run_losses(
    config: TrialConfig,
    steps: int,
    *,
    seconds_per_sample: float | None,
    workload: Workload,
    machine: Machine,
    model_config: transformers.PretrainedConfig,
    blocks: datasets.Dataset,
    device: torch.device,
    progress: Progress,
    engines: list[deepspeed.DeepSpeedEngine],
) -> dict[str, Any]:
    """Trains on the dataset's first global batch, again and again, without dropout; the same document on every rank.

    Args:
        seconds_per_sample, engines: see `run_trial`.

    Raises:
        OverflowedError: the loss scale never settled.
    """
    engine, parameters = build_engine(
        config, {"dropout": "none"}, workload, machine, model_config, device, progress, engines
    )
    samples = config.micro_batch_size * config.gradient_accumulation_steps
    predicted = predicted_step_seconds(
        samples=samples,
        seconds_per_sample=seconds_per_sample,
        flops_per_sample=flops_per_sample(model_config, parameters, workload.seq_len),
        device=machine.device,
    )
    progress.announce("numerics", seconds=warmup_deadline(predicted, steps, config.compile))
    micro_batches = share_of_rank(
        blocks, config, rank=torch.distributed.get_rank(), ranks=torch.distributed.get_world_size()
    )
    losses: list[float] = []
    skipped_steps = 0
    while len(losses) < steps:
        skipped_before = engine.skipped_steps
        total = torch.zeros((), dtype=torch.float64, device=device)
        for micro_batch in micro_batches:
            progress.enter("forward")
            loss = engine(**{key: tensor.to(device) for key, tensor in micro_batch.items()}).loss
            total += loss.detach().double() / len(micro_batches)
            progress.enter("backward")
            engine.backward(loss)
            progress.enter("step")
            engine.step()
        torch.distributed.all_reduce(total)
        mean = float(total) / torch.distributed.get_world_size()
        if not math.isfinite(mean):
            break
        if engine.skipped_steps == skipped_before:
            losses.append(mean)
            continue
        skipped_steps += 1
        if skipped_steps > MAX_SKIPPED_STEPS:
            raise OverflowedError(f"{MAX_SKIPPED_STEPS} steps overflowed in fp16; try bf16 or a lower loss scale")
    return {"losses": losses, "skipped_steps": skipped_steps}


def share_of_rank(
    blocks: datasets.Dataset, config: TrialConfig, *, rank: int, ranks: int
) -> list[dict[str, torch.Tensor]]:
    """This rank's micro-batches of the first global batch, which is the same samples however it is cut."""
    size = config.micro_batch_size
    rows = itertools.cycle(range(len(blocks)))
    indices = list(itertools.islice(rows, config.global_batch_size(ranks)))
    starts = (size * (ranks * step + rank) for step in range(config.gradient_accumulation_steps))
    return [collate([blocks[index] for index in indices[start : start + size]]) for start in starts]
