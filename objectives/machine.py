"""Hardware that ranks run on (the GPUs that `nvidia-smi` lists, or this machine's CPU), and the software versions.

The parent process asks without torch. Whether torch can use what is here, the ranks check when they start.
"""

import dataclasses
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from ds_tune.objectives.errors import EnvironmentFault, UsageError
from ds_tune.objectives.host_memory import host_memory_bytes, process_limit_bytes

GIB = 2**30

# Ranks on a CPU share the host's memory with everything else: leave a fifth of it alone.
CPU_MEMORY_SHARE = 0.8

DEFAULT_CPU_RANKS = 2

SMALL_STEP = 2**26
"""Bytes to which less than a GiB is rounded down."""

RECORDED_PACKAGES = (
    "ds-tune",
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "optuna",
    "optuna-dashboard",
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The hardware of a study, part of its identity: figures from another machine don't compare."""

    device: str
    """`cuda` or `cpu`."""
    name: str
    """Name of one device, such as `NVIDIA H200` or the CPU's model name."""
    ranks: int
    device_ids: tuple[int, ...] = ()
    """Indices into the visible GPUs; empty on CPU."""
    visible_devices: tuple[str, ...] = ()
    """What CUDA_VISIBLE_DEVICES has of them, where it chooses others than the first of the machine, in order: indices
    of the machine's GPUs, UUIDs or MIG instances. It is no part of a study's identity."""
    memory_bytes: int
    """Memory that one rank can have, before any cap."""
    memory_cap_bytes: int | None = None
    """Memory that the user lets one rank have."""
    compute_capability: str | None = None
    nodes: int = 1
    """Machines that the devices are in; ranks that really train are in one."""

    @property
    def capacity_bytes(self) -> int:
        """Memory that one rank may use: the cap if there is one, else all that is there."""
        return min(self.memory_cap_bytes or self.memory_bytes, self.memory_bytes)

    @property
    def description(self) -> str:
        """Such as `2 × NVIDIA H200 (139.8 GiB)` or `2 CPU ranks (AMD EPYC …, 9.4 GiB each)`."""
        gib = f"{self.memory_bytes / GIB:.1f} GiB"
        text = f"{self.ranks} CPU ranks ({self.name}, {gib} each)"
        if self.device == "cuda":
            text = f"{self.ranks} × {self.name} ({gib})"
        if self.memory_cap_bytes is not None:
            text += f", capped at {self.memory_cap_bytes / GIB:.2f} GiB a rank"
        return text

    def to_json(self) -> dict[str, Any]:
        document = dataclasses.asdict(self)
        if not self.visible_devices:
            del document["visible_devices"]
        if self.nodes == 1:
            del document["nodes"]
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        lists = {key: tuple(document[key]) for key in ("device_ids", "visible_devices") if key in document}
        return cls(**{**document, **lists})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One row of `nvidia-smi`."""

    name: str
    memory_bytes: int
    compute_capability: str
    visible_as: str = ""
    """How CUDA_VISIBLE_DEVICES names it; empty where that says nothing."""


def visible_gpus() -> list[Gpu]:
    """The GPUs that a process started now would see, in its order; an empty list without `nvidia-smi`.

    Raises:
        EnvironmentFault: `nvidia-smi` is there but fails, as after a driver update without a restart.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [
        program,
        "--query-gpu=name,memory.total,compute_cap,index,uuid",
        "--format=csv,noheader,nounits",
    ]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentFault(f"nvidia-smi does not answer ({error}); `gpus=0` runs on the CPU") from error
    if answer.returncode != 0:
        said = (answer.stdout + answer.stderr).strip().splitlines() or ["no message"]
        if "No devices were found" in said[-1]:
            return []
        raise EnvironmentFault(f"nvidia-smi fails: {said[-1]}; `gpus=0` runs on the CPU")
    rows = [[field.strip() for field in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
    found = {}
    for name, memory_mib, capability, index, uuid in rows:
        if not memory_mib.isdigit():  # [N/A]: the GPU shares the host's memory
            raise EnvironmentFault(f"nvidia-smi tells no memory of its own for {name}; `gpus=0` runs on the CPU")
        gpu = Gpu(name=name, memory_bytes=int(memory_mib) * 2**20, compute_capability=capability)
        found[index] = found[uuid] = gpu
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return [found[row[3]] for row in rows]
    visible: list[Gpu] = []
    for entry in map(str.strip, wanted.split(",")):
        if entry.startswith("MIG-"):
            # CUDA gives a process the first of them, and no other device beside it.
            return visible or [*_mig_instances(program, entry, found)][:1]
        match = [
            gpu for key, gpu in found.items() if key == entry or (entry.startswith("GPU-") and key.startswith(entry))
        ]
        if not match:  # CUDA itself ignores everything from the first invalid entry on
            break
        visible.append(dataclasses.replace(match[0], visible_as=entry))
    return visible


_MIG = re.compile(r"MIG (\d+g\.(\d+)gb\S*).*UUID: (MIG-[^)]+)\)")
MIG_MEMORY_SHARE = 0.95
"""Fraction of the memory in a profile's name that an instance has: 9.5 to 9.8 GiB of 10 on A100s and H100s."""


def _mig_instances(program: str, entry: str, gpus: Mapping[str, Gpu]) -> Iterator[Gpu]:
    """MIG instances whose name begins as an entry of CUDA_VISIBLE_DEVICES does."""
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentFault(f"nvidia-smi does not answer ({error}); `gpus=0` runs on the CPU") from error
    whole: Gpu | None = None
    for line in listed.splitlines():
        if (index := re.match(r"GPU (\d+):", line)) is not None:
            whole = gpus.get(index[1])
        elif (found := _MIG.search(line)) is not None and whole is not None and found[3].startswith(entry):
            memory_bytes = int(MIG_MEMORY_SHARE * int(found[2]) * GIB)
            yield dataclasses.replace(
                whole, name=f"{whole.name} MIG {found[1]}", memory_bytes=memory_bytes, visible_as=entry
            )


def detect_machine(*, gpus: int | None, cpu_ranks: int, memory_cap_bytes: int | None) -> Machine:
    """The hardware that a study will use.

    Args:
        gpus: how many of the visible GPUs; None for all of them, 0 for CPU ranks instead.
        cpu_ranks: ranks to start where no GPU is used.

    Raises:
        UsageError: more GPUs are asked for than there are, or a cap that is more than there is.
        EnvironmentFault: see `visible_gpus`.
    """
    present = [] if gpus == 0 else visible_gpus()
    if gpus is not None and gpus > len(present):
        raise UsageError(f"`gpus={gpus}`: {len(present)} GPUs are visible here (`gpus=0` runs on the CPU)")
    machine = _gpu_machine(present[: gpus or len(present)]) if present else _cpu_machine(cpu_ranks)
    if memory_cap_bytes is not None and memory_cap_bytes > machine.memory_bytes:
        available = machine.memory_bytes / GIB
        raise UsageError(
            f"`memory_cap={memory_cap_bytes / GIB:.1f}GiB` is more than a rank has here ({available:.1f} GiB)"
        )
    return dataclasses.replace(machine, memory_cap_bytes=memory_cap_bytes)


def _gpu_machine(gpus: Sequence[Gpu]) -> Machine:
    smallest = min(gpus, key=lambda gpu: gpu.memory_bytes)
    names = sorted({gpu.name for gpu in gpus})
    visible = tuple(gpu.visible_as for gpu in gpus if gpu.visible_as)
    return Machine(
        device="cuda",
        name=" + ".join(names),
        ranks=len(gpus),
        device_ids=tuple(range(len(gpus))),
        visible_devices=visible if visible != tuple(map(str, range(len(gpus)))) else (),
        memory_bytes=smallest.memory_bytes,
        compute_capability=min((gpu.compute_capability for gpu in gpus), key=_version),
    )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _cpu_machine(ranks: int) -> Machine:
    share = host_memory_bytes() * CPU_MEMORY_SHARE / ranks
    allowed = min(share, process_limit_bytes() or share)
    return Machine(
        device="cpu",
        name=_cpu_name(),
        ranks=ranks,
        memory_bytes=_rounded(allowed),
    )


def _rounded(allowed_bytes: float) -> int:
    """To whole GiB, so that a kernel update that keeps a few MiB more does not make it another machine."""
    if allowed_bytes < GIB:  # of a small container
        return max(int(allowed_bytes / SMALL_STEP), 1) * SMALL_STEP
    return round(allowed_bytes / GIB) * GIB


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def software_versions() -> dict[str, str]:
    """The versions that decide what a trial measures, read from package metadata without importing anything."""
    versions = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
