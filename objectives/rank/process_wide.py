"""What DeepSpeed and torch keep for a whole process: taken down before the first engine, and put back after each.

An engine sets some of it and the next one takes it for its own: with ZeRO-3's groups of ranks left over, DeepSpeed
refused every second trial that had some.
"""

import copy
import importlib
import sys
from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups

KEPT_BY_DEEPSPEED: dict[str, tuple[str, ...]] = {
    "deepspeed.utils.groups": ("mpu", "mesh_device", "expert_tensor_parallel_world_size", "_MPU_TENSOR_MODEL_PARALLEL"),
    "deepspeed.runtime.torch_autocast": ("TORCH_AUTOCAST_",),
    "deepspeed.runtime.tensor_parallel.init_utils": ("_TP_MODEL_INIT_ARGS",),
    "deepspeed.runtime.zero.partition_parameters": ("zero_init_context", "top_level_context"),
    "deepspeed.runtime.activation_checkpointing.checkpointing": (
        "mpu", "mp_", "num_layers", "deepspeed_checkpointing_enabled", "PARTITION_ACTIVATIONS",
        "CONTIGUOUS_CHECKPOINTING", "CPU_CHECKPOINT", "SYNCHRONIZE", "PROFILE_TIME", "contiguous_", "data_offsets",
        "size_offsets", "buffer_", "timers",
    ),
    "deepspeed.compile.util": ("backward_started", "pre_backward_hooks", "post_backward_hooks"),
}  # fmt: skip
"""Variables of DeepSpeed's modules, by how their names begin (DeepSpeed 0.19.8). Its process groups are ended by
`end_other_groups`. `tests/objectives/rank/test_process_wide.py` looks for what is missing here."""


class ProcessWide:
    """State of this process before its first engine."""

    def __init__(self) -> None:
        self._deepspeed: dict[tuple[str, str], Any] = {}
        for module, names in KEPT_BY_DEEPSPEED.items():
            try:
                found = vars(importlib.import_module(module))
            except ImportError:  # of another DeepSpeed
                continue
            self._deepspeed |= {
                (module, name): _own_copy(value)
                for name, value in found.items()
                if name.startswith(names) and not callable(value)
            }
        self._dtype = torch.get_default_dtype()
        self._matmul_precision = torch.get_float32_matmul_precision()
        self._is_deterministic = torch.are_deterministic_algorithms_enabled()
        self._takes_gradients = torch.is_grad_enabled()

    def restore(self) -> None:
        """Has the next engine begin as the first one did."""
        for (module, name), value in self._deepspeed.items():
            setattr(sys.modules[module], name, _own_copy(value))
        torch.set_default_dtype(self._dtype)
        torch.set_float32_matmul_precision(self._matmul_precision)
        torch.use_deterministic_algorithms(self._is_deterministic)
        torch.set_grad_enabled(self._takes_gradients)
        end_other_groups()


def _own_copy(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, dict | list | set) else value


def end_other_groups() -> None:
    """Ends the process groups that an engine made, and has DeepSpeed forget them.

    Its copy of all ranks stays: connecting one takes NCCL about a second.
    """
    if not torch.distributed.is_initialized():
        return
    stays = (torch.distributed.group.WORLD, groups._WORLD_GROUP)
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        if not any(group is each for each in stays):
            deepspeed.comm.destroy_process_group(group)
