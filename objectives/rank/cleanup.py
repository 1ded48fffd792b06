"""Gives back what a trial held, so that the next one in the same process starts as the first one did."""

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

from ds_tune.objectives.rank.engine import Destroyable


def release_trial(engine: Destroyable | None) -> None:
    """Destroys a trial's engine and frees its memory, on the device and on the host.

    The caller must hold no other reference to the engine, its model or an exception that passed through them.
    """
    if engine is not None:
        engine.destroy()
    del engine
    _forget_zero3_modules()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # offloaded states are pinned: 20 GiB of the host's memory for GPT2-xl
    _return_freed_pages()


def _forget_zero3_modules() -> None:
    """Drops DeepSpeed's two process-wide references that keep a whole ZeRO-3 engine alive after `destroy()`.

    One copy of the model's shards, the optimizer's states and its buffers hangs on each of them (DeepSpeed 0.19.8):
    `FWD_MODULE_STACK` gets the model pushed when hooks are set up, and nothing pops it; and `__params_to_release`
    is cached by `functools.lru_cache`, whose keys hold the parameter coordinator and its modules.
    """
    parameter_offload.FWD_MODULE_STACK.clear()
    for clear in _method_caches(partitioned_param_coordinator.PartitionedParameterCoordinator):
        clear()


def _method_caches(kind: type) -> Iterator[Callable[[], None]]:
    """The `cache_clear` of each method of a class that is cached, also behind one more decorator."""
    for method in vars(kind).values():
        wrapped: list[Any] = [cell.cell_contents for cell in getattr(method, "__closure__", None) or ()]
        for function in [method, *wrapped]:
            if callable(clear := getattr(function, "cache_clear", None)):
                yield clear


def _return_freed_pages() -> None:
    """Has glibc give freed heap pages back to the kernel; without it a large trial's pages look like a leak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def collectives_issued() -> list[int]:
    """How many collectives this rank has issued in each of its process groups.

    Ranks that failed may go on together only where these agree: one that issued fewer would answer its peers'
    last collective with its next trial's first.
    """
    groups = torch.distributed.distributed_c10d._world.pg_map
    return [int(group._get_sequence_number_for_group()) for group in groups]  # type: ignore[attr-defined]
