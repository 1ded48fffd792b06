"""The losses of some optimizer steps on this rank, for `objectives.numerics`."""

import itertools
import math

import datasets
import torch

from ds_tune.objectives.numerics import LossCurve
from ds_tune.objectives.rank.data import collate
from ds_tune.objectives.rank.engine import EngineSlot, predict_step_seconds
from ds_tune.objectives.rank.loop import TrainingLoop
from ds_tune.objectives.rank.resources import RankResources
from ds_tune.objectives.rank.session import MAX_SKIPPED_STEPS, OverflowedError
from ds_tune.objectives.rank.trainers import BUILDERS
from ds_tune.objectives.running.protocol import Losses
from ds_tune.objectives.timing.deadlines import warmup_deadline
from ds_tune.objectives.trial import TrialConfig


def run_losses(command: Losses, rank: RankResources, slot: EngineSlot) -> LossCurve:
    """Trains on the dataset's first global batch, again and again, without dropout; the same curve on every rank.

    Raises:
        OverflowedError: the loss scale never settled.
    """
    config = command.config
    engine, parameters = BUILDERS[rank.trainer](config, rank, slot, knobs={"dropout": "none"})
    predicted = predict_step_seconds(config, rank, parameters, command.seconds_per_sample)
    rank.progress.announce("numerics", seconds=warmup_deadline(predicted, command.steps, config.compile))
    ranks = torch.distributed.get_world_size()
    share = share_of_rank(rank.blocks, config, rank=torch.distributed.get_rank(), ranks=ranks)
    total = torch.zeros((), dtype=torch.float64, device=rank.device)
    loop = TrainingLoop(engine, itertools.cycle(share), rank.device, enter=rank.progress.enter, on_loss=total.add_)
    losses: list[float] = []
    skipped_steps = 0
    while len(losses) < command.steps:
        total.zero_()
        skipped = loop.step()
        torch.distributed.all_reduce(total)
        mean = float(total) / (len(share) * ranks)
        if not math.isfinite(mean):
            break
        if not skipped:
            losses.append(mean)
            continue
        skipped_steps += 1
        if skipped_steps > MAX_SKIPPED_STEPS:
            raise OverflowedError
    return LossCurve(losses=tuple(losses), skipped_steps=skipped_steps)


def share_of_rank(
    blocks: datasets.Dataset, config: TrialConfig, *, rank: int, ranks: int
) -> list[dict[str, torch.Tensor]]:
    """This rank's micro-batches of the first global batch, which is the same samples however it is cut."""
    size = config.micro_batch_size
    rows = itertools.cycle(range(len(blocks)))
    indices = list(itertools.islice(rows, config.global_batch_size(ranks)))
    starts = (size * (ranks * step + rank) for step in range(config.gradient_accumulation_steps))
    return [collate([blocks[index] for index in indices[start : start + size]]) for start in starts]
