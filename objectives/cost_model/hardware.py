"""`Hardware`: the figures of accelerators that the terms of bytes and seconds are made of.

Peaks are the makers' dense figures (data sheets); what training reaches of them is the business of `step_time`.
"""

import dataclasses
import re

from ds_tune.objectives.cost_model.hardware_names import alias, cleaned, instance, nearest
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.words import plain

TERA = 1e12
GIGA = 1e9


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One device."""

    name: str
    memory_bytes: int
    """Bytes that a process can allocate: the data sheet's size less what the driver keeps."""
    memory_bandwidth: float
    """Bytes a second."""
    half_flops: float
    """FLOP a second of fp16 matrix products that add up in fp32; bf16 too, where there is bf16."""
    single_flops: float
    """FLOP a second in fp32; tensor-float-32 is off by default in PyTorch."""
    link_bandwidth: float
    """Bytes a second to the other devices of the node, in one direction."""
    has_bf16: bool = True
    launch_factor: float = 1.0
    """Ratio of its host's time to launch kernels to an H200's of 2025: processors come in generations too."""

    def peak_flops(self, dtype: str) -> float:
        """FLOP a second for `fp16`, `bf16` or `fp32`."""
        return self.single_flops if dtype == "fp32" else self.half_flops


def _gpu(
    name: str,
    gib: float,
    bandwidth_gb: float,
    half: float,
    single: float,
    link_gb: float,
    *,
    has_bf16: bool = True,
    launch_factor: float = 1.0,
) -> Accelerator:
    return Accelerator(
        name=name,
        memory_bytes=int(gib * GIB),
        memory_bandwidth=bandwidth_gb * GIGA,
        half_flops=half * TERA,
        single_flops=single * TERA,
        link_bandwidth=link_gb * GIGA,
        has_bf16=has_bf16,
        launch_factor=launch_factor,
    )


PCIE3, PCIE4, PCIE5 = 10, 20, 40
"""GB a second that NCCL reaches through the host, of the 16, 32 and 64 of x16 slots."""

CATALOGUE = {
    accelerator.name: accelerator
    for accelerator in (
        _gpu("V100-16GB", 15.7, 900, 125, 15.7, 150, has_bf16=False, launch_factor=2.0),
        _gpu("V100-32GB", 31.7, 900, 125, 15.7, 150, has_bf16=False, launch_factor=2.0),
        _gpu("T4", 14.6, 320, 65, 8.1, PCIE3, has_bf16=False, launch_factor=2.0),
        _gpu("A10", 22.1, 600, 125, 31.2, PCIE4, launch_factor=1.5),
        _gpu("A100-40GB", 39.4, 1555, 312, 19.5, 300, launch_factor=1.5),
        _gpu("A100-80GB", 79.1, 2039, 312, 19.5, 300, launch_factor=1.5),
        _gpu("A6000", 47.4, 768, 155, 38.7, PCIE4, launch_factor=1.5),
        _gpu("L4", 22.0, 300, 121, 30.3, PCIE4),
        _gpu("L40S", 44.4, 864, 362, 91.6, PCIE4),
        _gpu("H100", 79.1, 3350, 989, 67, 450),
        _gpu("H200", 139.8, 4800, 989, 67, 450),
        _gpu("B200", 178.0, 8000, 2250, 80, 900),
        _gpu("RTX3090", 23.6, 936, 71, 35.6, PCIE4, launch_factor=1.5),
        _gpu("RTX4090", 23.6, 1008, 165, 82.6, PCIE4),
        _gpu("RTX5090", 31.4, 1792, 210, 104.8, PCIE5),
    )
}

SOLD_AS_GB = {
    "T4": (16,), "A10": (24,), "A6000": (48,), "L4": (24,), "L40S": (48,), "H100": (80,), "H200": (141,),
    "B200": (180, 192), "RTX3090": (24,), "RTX4090": (24,), "RTX5090": (32,),
}  # fmt: skip
"""The size that makers and shops say, of those whose name has none because there is no other."""

# What `nvidia-smi` calls them. The first pattern that matches; memory decides between the sizes of one chip.
_NAMES = (
    ("V100", ("V100-16GB", "V100-32GB")),
    (r"\bA100(?!0)", ("A100-40GB", "A100-80GB")),
    (r"\bT4\b", ("T4",)),
    (r"\bA10G?\b", ("A10",)),
    (r"A6000|\bA40\b", ("A6000",)),
    (r"L40", ("L40S",)),
    (r"\bL4\b", ("L4",)),
    (r"H200|GH200", ("H200",)),
    (r"H100|H800", ("H100",)),
    (r"B200|B100", ("B200",)),
    (r"5090", ("RTX5090",)),
    (r"4090", ("RTX4090",)),
    (r"3090", ("RTX3090",)),
)

CPU_FLOPS_A_RANK = 40 * GIGA
"""FLOP a second of one or two cores in fp32; the study's own measurements correct it."""

OUTSIDE_ALONE_GIB, OUTSIDE_GIB = 1.7, 2.1
"""GiB that a rank holds of its device besides tensors, alone and beside others: context, kernels, NCCL. From what torch
2.11 said when H100s were full; of a smaller device at most `OUTSIDE_SHARE` is assumed."""
OUTSIDE_SHARE = 0.05

MOST_GPUS = 2**20
"""No machine has more; a larger number is a slip of the finger."""

GPUS_A_NODE = 8
"""GPUs of a node where nobody says how many: DGX and HGX machines from the A100 on."""
V100S_A_NODE = 16
"""Of a DGX-2, on which DeepSpeed's own results were published."""

NODE_BANDWIDTH_A_GPU = 25 * GIGA
"""Bytes a second between nodes, for each GPU of one: a 200 Gb/s adapter each, as a DGX A100 has (its data sheet).
NCCL's rings use all adapters of a node at once. Not measured here: no recording is of several nodes."""

_SPEC = re.compile(r"(?:(?:([0-9]+)\s*[x×]\s*)?([0-9]+)\s*[x×]\s*)?(.+)", re.IGNORECASE)
_SIZED = re.compile(r"(.+?)[\s_-]+(\d{1,4})\s*Gi?B?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """The devices that a study runs on."""

    accelerator: Accelerator
    ranks: int
    capacity_bytes: int
    """Bytes that one rank may use, after any cap."""
    nodes: int = 1
    """Machines that they are in."""
    is_known: bool = True
    """True where the accelerator is in the catalogue; figures of others are a guess from their memory."""

    @property
    def name(self) -> str:
        per_node, rest = divmod(self.ranks, self.nodes)
        count = f"{self.nodes}x{per_node}" if self.nodes > 1 and not rest else str(self.ranks)
        return f"{count}x{self.accelerator.name}"

    @property
    def nodes_words(self) -> str | None:
        """Sentence on the nodes that the devices are taken to be in; None for one."""
        if self.nodes == 1:
            return None
        each = (
            f"{self.ranks // self.nodes}"
            if self.ranks % self.nodes == 0
            else "at most " + str(-(-self.ranks // self.nodes))
        )
        return (
            f"The {self.ranks} GPUs are taken for {self.nodes} nodes of {each}, with {NODE_BANDWIDTH_A_GPU / GIGA:.0f} "
            f"GB/s a GPU between them; NODESxGPUSx{self.accelerator.name} says otherwise."
        )

    @property
    def link_bandwidth(self) -> float:
        """Bytes a second from one device to the others in a ring, in one direction."""
        within = self.accelerator.link_bandwidth
        if self.nodes == 1:
            return within
        return min(within, self.ranks / self.nodes * NODE_BANDWIDTH_A_GPU)

    @property
    def outside_bytes(self) -> float:
        """Bytes of the capacity that no tensor can have. A cap holds for tensors alone: it leaves room for the rest."""
        if self.device == "cpu":
            return 0.0
        whole = self.accelerator.memory_bytes
        outside = min((OUTSIDE_GIB if self.ranks > 1 else OUTSIDE_ALONE_GIB) * GIB, OUTSIDE_SHARE * whole)
        return max(self.capacity_bytes - (whole - outside), 0.0)

    @property
    def device(self) -> str:
        return "cpu" if self.accelerator.name == "CPU" else "cuda"


def parse_hardware(text: str, *, memory_cap_bytes: int | None = None) -> Hardware:
    """Hardware from words such as `16xV100-32GB`, `2xH200`, `8x8xH100` (nodes first), `RTX4090`, what `nvidia-smi`
    calls a GPU, or a cloud's machine such as `p4d.24xlarge`.

    Raises:
        UsageError: it is not in the catalogue, or the cap is more than it has.
    """
    match = _SPEC.fullmatch(text.strip())
    node_count, count, name = (match[1], match[2], match[3]) if match else (None, None, text)
    machine = instance(name)
    if machine is not None and node_count is None:
        node_count, count, name = count, str(machine[0]), machine[1]
    found = _called(alias(name) or name) or _called(cleaned(name))
    name = name if _called(name) else cleaned(name).upper()
    if not found and (sized := _SIZED.fullmatch(name)) and (chips := _called(sized[1])):
        found = [chip for chip in chips if int(sized[2]) in SOLD_AS_GB.get(chip.name, ())]
        if not found:
            sizes = [name for chip in chips for name in _with_sizes(chip)]
            raise UsageError(
                f"`hardware={plain(text)}`: no {sized[1]} with {sized[2]} GB is known; write {' or '.join(sizes)}"
            )
    if len(found) != 1:
        hint = f"say which: {', '.join(each.name for each in found)}" if found else f"known are {', '.join(CATALOGUE)}"
        near = None if found else nearest(match[3] if match else text, list(CATALOGUE))
        hint = f"nearest to that is {near}; {hint}" if near else hint
        raise UsageError(f"`hardware={plain(text)}`: write a number and a GPU, such as 16xV100-32GB; {hint}")
    if len(count or "") > len(str(MOST_GPUS)) or int(count or 1) > MOST_GPUS:
        raise UsageError(f"`hardware={plain(text)}`: no more than {MOST_GPUS} GPUs")
    ranks = int(count or 1) * int(node_count or 1)
    if ranks > MOST_GPUS:
        raise UsageError(f"`hardware={plain(text)}`: no more than {MOST_GPUS} GPUs")
    if ranks < 1:
        raise UsageError(f"`hardware={plain(text)}`: at least one GPU")
    accelerator = found[0]
    if memory_cap_bytes is not None and memory_cap_bytes > accelerator.memory_bytes:
        has = accelerator.memory_bytes / GIB
        raise UsageError(f"`memory_cap` is more than an {accelerator.name} has ({has:.1f} GiB)")
    a_node = V100S_A_NODE if accelerator.name.startswith("V100") else max(GPUS_A_NODE, machine[0] if machine else 0)
    return Hardware(
        accelerator=accelerator,
        ranks=ranks,
        capacity_bytes=memory_cap_bytes or accelerator.memory_bytes,
        nodes=int(node_count) if node_count is not None else -(-ranks // a_node),
    )


def _called(name: str) -> list[Accelerator]:
    """Accelerators of the catalogue with this name, or else that begin with it."""
    plain = _plain(name)
    exactly = [known for known in CATALOGUE.values() if _plain(known.name) == plain]
    return exactly or [known for known in CATALOGUE.values() if _plain(known.name).startswith(plain)]


def _with_sizes(accelerator: Accelerator) -> list[str]:
    return [f"{accelerator.name}-{gb}GB" for gb in SOLD_AS_GB.get(accelerator.name, ())] or [accelerator.name]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("nvidia", "").replace("geforce", ""))


def hardware_of(machine: Machine) -> Hardware:
    """The hardware of a machine that was detected or recorded."""
    if machine.device == "cpu":
        accelerator = Accelerator(
            name="CPU",
            memory_bytes=machine.memory_bytes,
            memory_bandwidth=10 * GIGA,
            half_flops=CPU_FLOPS_A_RANK / 4,
            single_flops=CPU_FLOPS_A_RANK,
            link_bandwidth=1 * GIGA,
        )
        return Hardware(accelerator=accelerator, ranks=machine.ranks, capacity_bytes=machine.capacity_bytes)
    for pattern, names in _NAMES:
        if re.search(pattern, machine.name):
            sizes = [CATALOGUE[name] for name in names]
            # Where the name says its size it is right: a recording's memory may be that of a cap.
            named = [size for size in sizes if size.name.split("-")[-1] in machine.name]
            accelerator = min(named or sizes, key=lambda size: abs(size.memory_bytes - machine.memory_bytes))
            return Hardware(
                accelerator=accelerator,
                ranks=machine.ranks,
                capacity_bytes=machine.capacity_bytes,
                nodes=machine.nodes,
            )
    closest = min(CATALOGUE.values(), key=lambda known: abs(known.memory_bytes - machine.memory_bytes))
    return Hardware(
        accelerator=dataclasses.replace(closest, name=machine.name, memory_bytes=machine.memory_bytes),
        ranks=machine.ranks,
        capacity_bytes=machine.capacity_bytes,
        is_known=False,
    )


def machine_of(hardware: Hardware) -> Machine:
    """The machine that a study on imagined hardware is about."""
    capped = hardware.capacity_bytes < hardware.accelerator.memory_bytes
    return Machine(
        device=hardware.device,
        name=f"NVIDIA {hardware.accelerator.name}",
        ranks=hardware.ranks,
        device_ids=tuple(range(hardware.ranks)),
        memory_bytes=hardware.accelerator.memory_bytes,
        memory_cap_bytes=hardware.capacity_bytes if capped else None,
        compute_capability=None,
        nodes=hardware.nodes,
    )
