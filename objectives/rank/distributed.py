"""Connects the ranks of a group, for torch and for DeepSpeed."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import deepspeed
import torch

RENDEZVOUS_SECONDS = 120


def skip_unused_ops() -> None:
    """Keeps DeepSpeed from compiling its shared-memory op (most of a minute) when it connects CPU ranks.

    The op serves `inference_all_reduce` alone; training never calls it, and DeepSpeed falls back without it.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def connect_ranks(device: torch.device) -> None:
    """Joins this rank to its group, on the address and the listening socket that the launcher gave.

    The tuner opened rank 0's listening socket before any rank was started, so no other program can have taken
    the port in between.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    listen_fd = os.environ.pop("DS_TUNE_RENDEZVOUS_FD", None)
    store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0,
        master_listen_fd=int(listen_fd) if listen_fd is not None else None,
        wait_for_workers=False,
        timeout=timedelta(seconds=RENDEZVOUS_SECONDS),
    )
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        device_id=device if device.type == "cuda" else None,
    )
    skip_unused_ops()
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)


class Peers:
    """The other ranks of the group, with whom this one agrees on how to go on."""

    def __init__(self, device: torch.device, group: Any = None) -> None:
        """
        Args:
            device: of the tensors that are exchanged.
            group: process group to exchange them in; None for the default one.
        """
        self._device = device
        self._group = group

    def slowest(self, seconds: Sequence[float]) -> list[float]:
        """The largest of all ranks' values, one by one; the same on every rank. All give as many."""
        if not seconds:
            return []
        return self._reduced(seconds, torch.distributed.ReduceOp.MAX)

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum of all ranks' values, one by one; the same on every rank. All give as many."""
        return self._reduced(values, torch.distributed.ReduceOp.SUM) if values else []

    def _reduced(self, given: Sequence[float], operation: Any) -> list[float]:
        values = torch.tensor(given, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(values, op=operation, group=self._group)
        return [float(value) for value in values.tolist()]

    def mean(self, value: float) -> float:
        """The mean over all ranks."""
        values = torch.tensor([value], dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(values, group=self._group)
        return float(values) / torch.distributed.get_world_size(self._group)

    def barrier(self) -> None:
        """Returns once all ranks have come here."""
        torch.distributed.barrier(group=self._group)
