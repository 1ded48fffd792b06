"""A rank's resources: what it keeps from trial to trial."""

import dataclasses

import datasets
import torch
import transformers

from ds_tune.objectives.machine import Machine
from ds_tune.objectives.rank.device import Meter
from ds_tune.objectives.rank.distributed import Peers
from ds_tune.objectives.rank.progress import Progress
from ds_tune.objectives.running.protocol import DEEPSPEED
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankResources:
    """A rank that is ready to run trials: what it trains, where, and whom it tells."""

    workload: HuggingFaceWorkload
    machine: Machine
    model_config: transformers.PretrainedConfig
    blocks: datasets.Dataset
    """Rows of `seq_len` tokens in the column `input_ids`."""
    samples: datasets.Dataset | None = None
    """Rows of their own lengths, which trials are fed in place of blocks; None where samples are packed."""
    device: torch.device
    meter: Meter
    peers: Peers
    progress: Progress
    trainer: str = DEEPSPEED
    """See `RankContext`."""
