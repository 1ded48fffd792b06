"""Memory that this process and its children may have: the host's, or what a container, job or shell allows."""

import contextlib
import os
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path

MIB = 2**20


def host_memory_bytes(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> int:
    """Bytes of the host's memory, or of the smallest limit that holds here.

    Args:
        root: the folder that has `proc` and `sys`.
    """
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([whole, *_cgroup_limits(root), *_job_limits(environment)])


def process_limit_bytes() -> int | None:
    """Bytes of address space that a shell allows one process (`ulimit -v`); None for as many as it wants."""
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    return min((limit for limit in limits if limit != resource.RLIM_INFINITY), default=None)


def _cgroup_limits(root: Path) -> Iterator[int]:
    """Limits of the control groups that this process is in, and of those around them; version 2 and 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    names: tuple[str, ...]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.high")
        elif "memory" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes",)
        else:
            continue
        inside = mount / path.lstrip("/")
        # In a container without a namespace of its own the path is the host's, and the mount is the group itself.
        for folder in (inside, *inside.parents):
            for name in names:
                with contextlib.suppress(OSError, ValueError):  # "max" is no number
                    yield int((folder / name).read_text())
            if folder == mount:
                break


def _job_limits(environment: Mapping[str, str]) -> Iterator[int]:
    """Limits that Slurm tells its jobs, in MiB; it does not always have the kernel keep them."""
    with contextlib.suppress(KeyError, ValueError):
        yield _positive(int(environment["SLURM_MEM_PER_NODE"])) * MIB
    with contextlib.suppress(KeyError, ValueError):
        yield _positive(int(environment["SLURM_MEM_PER_CPU"])) * int(environment["SLURM_CPUS_ON_NODE"]) * MIB


def _positive(number: int) -> int:
    """Returns the number; 0 is Slurm's word for all of the node's memory.

    Raises:
        ValueError: it is not above zero.
    """
    if number <= 0:
        raise ValueError
    return number
