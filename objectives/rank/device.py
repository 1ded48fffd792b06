"""This rank's device: choosing it, checking that torch can use it, capping and reading its memory."""

import os
import resource
import time
from pathlib import Path
from typing import Any, Protocol

import torch

from ds_tune.objectives.errors import EnvironmentFault
from ds_tune.objectives.machine import Machine

LAST_TORCH_WITH_VOLTA = "2.10"


def missing_kernels(name: str, capability: tuple[int, int], architectures: list[str]) -> str | None:
    """The sentence for a torch that carries no kernels for a GPU, or None when it can run there.

    Machine code runs on its own major version from its minor version on; PTX (`compute_…`) is compiled by the
    driver for anything newer.

    Args:
        architectures: `torch.cuda.get_arch_list()`, such as `["sm_75", "sm_90", "compute_120"]`.
    """
    for architecture in architectures:
        kind, _, digits = architecture.partition("_")
        digits = digits.rstrip("af")
        if not digits.isdigit():
            continue
        built = (int(digits[:-1]), int(digits[-1]))
        if kind == "sm" and built[0] == capability[0] and built[1] <= capability[1]:
            return None
        if kind == "compute" and built <= capability:
            return None
    version = f"{capability[0]}.{capability[1]}"
    remedy = (
        "a newer torch"
        if capability >= (9, 0)
        else f"the last one that does: pip install 'torch=={LAST_TORCH_WITH_VOLTA}.*'"
    )
    return f"torch {torch.__version__} has no kernels for {name} (compute capability {version}); install {remedy}"


def claim_device(machine: Machine, local_rank: int) -> torch.device:
    """Makes this rank's GPU the current one, before anything else touches CUDA.

    Raises:
        EnvironmentFault: this torch cannot run there; the text says what to install.
    """
    if machine.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        wanted = f"{machine.ranks} × {machine.name}"
        why = (
            "was built without CUDA"
            if torch.version.cuda is None
            else f"(CUDA {torch.version.cuda}) finds no usable driver"
        )
        raise EnvironmentFault(
            f"torch {torch.__version__} {why}, so it cannot use {wanted}: install a torch that fits the driver "
            "(https://pytorch.org/get-started/locally), or run on the CPU with `gpus=0`"
        )
    index = machine.device_ids[local_rank]
    torch.cuda.set_device(index)
    name = torch.cuda.get_device_name(index)
    sentence = missing_kernels(name, torch.cuda.get_device_capability(index), torch.cuda.get_arch_list())
    if sentence is not None:
        raise EnvironmentFault(sentence)
    torch.ones(1, device="cuda").add_(1).item()  # the context, and the proof that kernels run
    return torch.device("cuda", index)


def cap_memory(machine: Machine) -> None:
    """Lets this rank have no more memory than the user allows; a CPU rank never more than its share.

    On a GPU it is the caching allocator that refuses; on a CPU the kernel does, and torch raises.
    """
    if machine.device == "cuda":
        if machine.memory_cap_bytes is not None:
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            torch.cuda.set_per_process_memory_fraction(min(machine.memory_cap_bytes / total, 1.0))
        return
    # The limit counts address space, of which libraries reserve a gigabyte that they never touch: what is reserved
    # now is not held against the cap, only what is occupied.
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    untouched = max(_status_bytes("VmData") - resident_bytes(), 0)
    limit = machine.capacity_bytes + untouched
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def lift_cap(machine: Machine) -> None:
    """Takes a CPU rank's cap away: it is for training, and what ran out of memory needs some to say so."""
    if machine.device == "cpu":
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


class Meter(Protocol):
    """Time and memory of a device."""

    def mark(self) -> Any:
        """A point in this device's time, cheap enough for every micro-step."""

    def synchronize(self) -> None:
        """Waits until the device has done all it was given; marks can be compared from then on."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks, in seconds of the device's clock."""

    def reset_peaks(self) -> None:
        """Forgets the highest memory figures so far."""

    def peak_memory_bytes(self) -> int: ...

    def reserved_memory_bytes(self) -> int: ...

    def alloc_retries(self) -> int:
        """Since `reset_peaks`."""

    def held_bytes(self) -> int:
        """Memory of the device that this process holds now."""


class CudaMeter:
    """Device events, so that timing adds no synchronization to the training it times."""

    def __init__(self) -> None:
        self._retries_before = 0

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end)) / 1000

    def reset_peaks(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        self._retries_before = self._all_retries()

    def peak_memory_bytes(self) -> int:
        return int(torch.cuda.max_memory_allocated())

    def reserved_memory_bytes(self) -> int:
        return int(torch.cuda.max_memory_reserved())

    def alloc_retries(self) -> int:
        return self._all_retries() - self._retries_before

    @staticmethod
    def _all_retries() -> int:
        """Since the process started: nothing sets this counter back."""
        return int(torch.cuda.memory_stats().get("num_alloc_retries", 0))

    def held_bytes(self) -> int:
        return int(torch.cuda.memory_allocated())


class CpuMeter:
    """The process's clock and its resident memory."""

    def mark(self) -> float:
        return time.perf_counter()

    def synchronize(self) -> None:
        pass

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def reset_peaks(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM: see proc(5)

    def peak_memory_bytes(self) -> int:
        return _status_bytes("VmHWM")

    def reserved_memory_bytes(self) -> int:
        return self.peak_memory_bytes()

    def alloc_retries(self) -> int:
        return 0

    def held_bytes(self) -> int:
        return resident_bytes()


def _status_bytes(field: str) -> int:
    """A figure of this process from proc(5)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")


def resident_bytes() -> int:
    """Host memory that this process occupies."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def meter_for(device: torch.device) -> Meter:
    return CudaMeter() if device.type == "cuda" else CpuMeter()


def local_rank() -> int:
    return int(os.environ["LOCAL_RANK"])
