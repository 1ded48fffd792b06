"""Memory limits of containers and jobs."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from ds_tune.objectives.host_memory import host_memory_bytes

GIB = 2**30
Root = Callable[[Mapping[str, str]], Path]


@pytest.fixture
def root(tmp_path: Path) -> Root:
    def make(files: Mapping[str, str]) -> Path:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return make


V1 = "9:cpu:/docker/a\n8:memory:/docker/a\n"


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "1073741824\n"},
        {"proc/self/cgroup": "0::/job/step\n", "sys/fs/cgroup/job/memory.max": "1073741824\n",
         "sys/fs/cgroup/job/step/memory.max": "max\n"},
        {"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/memory.high": "1073741824\n"},
        {"proc/self/cgroup": "0::/docker/not-here\n", "sys/fs/cgroup/memory.max": "1073741824\n"},
        {"proc/self/cgroup": V1, "sys/fs/cgroup/memory/docker/a/memory.limit_in_bytes": "1073741824\n",
         "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"},
        {"proc/self/cgroup": V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": "1073741824\n"},
    ],
    ids=["v2", "v2, the job's", "v2, high", "v2 without a namespace", "v1", "v1 without a namespace"],
)  # fmt: skip
def test_the_smallest_limit_of_the_control_groups_holds(root: Root, files: Mapping[str, str]) -> None:
    assert host_memory_bytes(root(files), {}) == GIB


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_MEM_PER_NODE": "1024"}, GIB),
        ({"SLURM_MEM_PER_CPU": "512", "SLURM_CPUS_ON_NODE": "2"}, GIB),
        ({"SLURM_MEM_PER_NODE": "0"}, None),
        ({"SLURM_MEM_PER_NODE": "all"}, None),
    ],
)
def test_slurm_s_memory_of_a_job_is_a_limit(root: Root, environment: Mapping[str, str], expected: int | None) -> None:
    empty = root({})
    assert host_memory_bytes(empty, environment) == (expected or host_memory_bytes(empty, {}))


def test_unlimited_groups_leave_the_host_s_memory(root: Root) -> None:
    files = {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n"}
    assert host_memory_bytes(root(files), {}) == host_memory_bytes(root({"proc/self/cgroup": ""}), {})
