"""This rank's device: whether torch can use it, and how its memory is capped and read."""

import subprocess
import sys

import pytest
import torch

from ds_tune.objectives.errors import EnvironmentFault
from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.rank.device import CpuMeter, claim_device, missing_kernels

TORCH_2_11 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize(
    ("name", "capability", "architectures"),
    [
        ("NVIDIA H200", (9, 0), TORCH_2_11),
        ("NVIDIA A10", (8, 6), ["sm_80"]),
        ("NVIDIA H200", (9, 0), ["sm_90a"]),
        ("NVIDIA B300", (10, 3), ["sm_90", "compute_90"]),
        ("Tesla V100", (7, 0), ["sm_70", "sm_90"]),
    ],
    ids=["its own", "a lower minor version", "with extras", "PTX of an older one", "V100 where it is built for"],
)
def test_a_gpu_that_torch_has_kernels_for_is_fine(
    name: str, capability: tuple[int, int], architectures: list[str]
) -> None:
    assert missing_kernels(name, capability, architectures) is None


def test_a_v100_is_told_the_last_torch_that_runs_on_it() -> None:
    sentence = missing_kernels("Tesla V100-SXM2-32GB", (7, 0), TORCH_2_11)
    assert sentence is not None
    assert "has no kernels for Tesla V100-SXM2-32GB (compute capability 7.0)" in sentence
    assert "pip install 'torch==2.10.*'" in sentence


@pytest.mark.parametrize(
    ("capability", "architectures"),
    [((12, 0), ["sm_90"]), ((8, 0), ["sm_86"]), ((9, 0), ["compute_100"]), ((9, 0), [])],
    ids=["a later major version", "a higher minor version only", "PTX of a later one", "no CUDA at all"],
)
def test_a_gpu_that_torch_has_no_kernels_for_gets_a_sentence(
    capability: tuple[int, int], architectures: list[str]
) -> None:
    assert "has no kernels for this GPU" in str(missing_kernels("this GPU", capability, architectures))


def test_a_cpu_rank_needs_no_claim(machine: Machine) -> None:
    assert claim_device(machine, 0) == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this torch can use CUDA")
def test_gpus_that_torch_cannot_use_are_an_environment_fault_that_says_what_to_do() -> None:
    gpus = Machine(device="cuda", name="NVIDIA H200", ranks=2, device_ids=(0, 1), memory_bytes=140 * GIB)
    with pytest.raises(EnvironmentFault, match=r"cannot use 2 × NVIDIA H200: install a torch .* `gpus=0`"):
        claim_device(gpus, 0)


def in_a_process(code: str) -> str:
    """What a process prints: limits of memory are for ever, so they are not tried in this one."""
    code = f"""
import resource, torch
from ds_tune.objectives.machine import Machine
from ds_tune.objectives.rank.device import cap_memory
machine = Machine(device="cpu", name="test", ranks=2, memory_bytes=4 * 2**30)
{code}"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_a_cpu_rank_cannot_have_more_than_its_share() -> None:
    assert (
        in_a_process("""
cap_memory(machine)
torch.zeros(2**30, dtype=torch.uint8)
try:
    torch.zeros(8 * 2**30, dtype=torch.uint8)
except RuntimeError as error:
    print("refused" if "allocate memory" in str(error) else error)
""")
        == "refused"
    )


def test_a_share_above_the_limit_that_the_shell_set_leaves_that_limit() -> None:
    assert (
        in_a_process("""
resource.setrlimit(resource.RLIMIT_DATA, (3 * 2**30, 3 * 2**30))
cap_memory(machine)
print(resource.getrlimit(resource.RLIMIT_DATA)[0] // 2**30)
""")
        == "3"
    )


def test_the_peak_of_a_cpu_rank_is_what_it_held_at_most_since_the_last_reset() -> None:
    meter = CpuMeter()
    meter.reset_peaks()
    before = meter.peak_memory_bytes()
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    del block
    grown = meter.peak_memory_bytes()
    assert grown >= before + 32 * 2**20
    meter.reset_peaks()
    assert meter.peak_memory_bytes() < grown


def test_the_time_between_two_marks_is_in_seconds() -> None:
    assert CpuMeter().seconds(2.0, 3.5) == 1.5
    first, second = CpuMeter().mark(), CpuMeter().mark()
    assert CpuMeter().seconds(first, second) >= 0
