"""Which hardware a study runs on: what nvidia-smi lists, or CPU ranks."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_tune.objectives.errors import EnvironmentFault, UsageError
from ds_tune.objectives.machine import GIB, Machine, detect_machine, software_versions, visible_gpus

H200_UUID = "GPU-11111111-2222-3333-4444-555555555555"
V100_UUID = "GPU-66666666-7777-8888-9999-000000000000"
TWO_GPUS = f"NVIDIA H200, 143771, 9.0, 0, {H200_UUID}\nTesla V100-SXM2-32GB, 32768, 7.0, 1, {V100_UUID}\n"

NvidiaSmi = Callable[..., None]


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NvidiaSmi:
    """Puts an nvidia-smi on the PATH that answers as told."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def install(stdout: str, status: int = 0) -> None:
        (tmp_path / "answer").write_text(stdout)
        program = tmp_path / "nvidia-smi"
        program.write_text(f'#!/bin/sh\n/bin/cat "{tmp_path}/answer"\nexit {status}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return install


@pytest.fixture
def no_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def names() -> list[str]:
    return [gpu.name for gpu in visible_gpus()]


def test_every_gpu_of_the_machine_is_found(nvidia_smi: NvidiaSmi) -> None:
    nvidia_smi(TWO_GPUS)
    h200, v100 = visible_gpus()
    assert (h200.name, h200.memory_bytes, h200.compute_capability) == ("NVIDIA H200", 143771 * 2**20, "9.0")
    assert v100.name == "Tesla V100-SXM2-32GB"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("1", ["Tesla V100-SXM2-32GB"]),
        ("1,0", ["Tesla V100-SXM2-32GB", "NVIDIA H200"]),
        (V100_UUID, ["Tesla V100-SXM2-32GB"]),
        ("GPU-66666666", ["Tesla V100-SXM2-32GB"]),
        (f"{V100_UUID}, 0", ["Tesla V100-SXM2-32GB", "NVIDIA H200"]),
        ("0,7,1", ["NVIDIA H200"]),
        ("", []),
        ("-1", []),
    ],
    ids=["an index", "order", "a UUID", "a UUID's start", "a space", "up to the first invalid", "none", "minus one"],
)
def test_cuda_visible_devices_chooses_as_cuda_does(
    nvidia_smi: NvidiaSmi, monkeypatch: pytest.MonkeyPatch, visible: str, expected: list[str]
) -> None:
    nvidia_smi(TWO_GPUS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert names() == expected


@pytest.mark.usefixtures("no_nvidia_smi")
def test_without_nvidia_smi_there_are_no_gpus() -> None:
    assert visible_gpus() == []


def test_a_driver_without_devices_is_no_fault(nvidia_smi: NvidiaSmi) -> None:
    nvidia_smi("No devices were found\n", status=6)
    assert visible_gpus() == []


def test_a_driver_that_fails_is_a_fault_with_its_own_words(nvidia_smi: NvidiaSmi) -> None:
    nvidia_smi("Failed to initialize NVML: Driver/library version mismatch\n", status=18)
    with pytest.raises(EnvironmentFault, match="Driver/library version mismatch; `gpus=0` runs on the CPU"):
        visible_gpus()


def test_a_gpu_without_memory_of_its_own_is_a_fault_in_one_sentence(nvidia_smi: NvidiaSmi) -> None:
    nvidia_smi(f"NVIDIA GB10, [N/A], 12.1, 0, {H200_UUID}\n")
    with pytest.raises(EnvironmentFault, match="NVIDIA GB10"):
        visible_gpus()


def test_all_visible_gpus_are_used_and_the_smallest_is_what_a_rank_can_have(nvidia_smi: NvidiaSmi) -> None:
    nvidia_smi(TWO_GPUS)
    machine = detect_machine(gpus=None, cpu_ranks=2, memory_cap_bytes=None)
    assert (machine.device, machine.ranks, machine.device_ids) == ("cuda", 2, (0, 1))
    assert machine.memory_bytes == 32768 * 2**20
    assert machine.compute_capability == "7.0"
    assert machine.name == "NVIDIA H200 + Tesla V100-SXM2-32GB"


def test_fewer_gpus_can_be_asked_for(nvidia_smi: NvidiaSmi) -> None:
    nvidia_smi(TWO_GPUS)
    machine = detect_machine(gpus=1, cpu_ranks=2, memory_cap_bytes=None)
    assert (machine.ranks, machine.name) == (1, "NVIDIA H200")


def test_more_gpus_than_there_are_is_a_user_s_error(nvidia_smi: NvidiaSmi) -> None:
    nvidia_smi(TWO_GPUS)
    with pytest.raises(UsageError, match="`gpus=3`: 2 GPUs are visible here"):
        detect_machine(gpus=3, cpu_ranks=2, memory_cap_bytes=None)


def test_gpus_0_means_the_cpu_and_does_not_ask_the_driver(nvidia_smi: NvidiaSmi) -> None:
    nvidia_smi("broken", status=1)
    machine = detect_machine(gpus=0, cpu_ranks=4, memory_cap_bytes=None)
    assert (machine.device, machine.ranks, machine.device_ids) == ("cpu", 4, ())


@pytest.mark.usefixtures("no_nvidia_smi")
def test_cpu_ranks_share_the_host_s_memory() -> None:
    two, four = (detect_machine(gpus=None, cpu_ranks=ranks, memory_cap_bytes=None) for ranks in (2, 4))
    assert two.memory_bytes % GIB == 0
    assert four.memory_bytes <= two.memory_bytes


@pytest.mark.usefixtures("no_nvidia_smi")
def test_a_cap_lowers_what_a_rank_may_use() -> None:
    machine = detect_machine(gpus=None, cpu_ranks=1, memory_cap_bytes=GIB // 2)
    assert machine.capacity_bytes == GIB // 2
    assert "capped at 0.50 GiB a rank" in machine.description


@pytest.mark.usefixtures("no_nvidia_smi")
def test_a_cap_above_what_is_there_is_a_user_s_error() -> None:
    with pytest.raises(UsageError, match=r"`memory_cap=1048576\.0GiB` is more than a rank has here"):
        detect_machine(gpus=None, cpu_ranks=1, memory_cap_bytes=2**50)


def test_a_machine_survives_json_and_describes_itself(nvidia_smi: NvidiaSmi) -> None:
    nvidia_smi(TWO_GPUS)
    machine = detect_machine(gpus=1, cpu_ranks=2, memory_cap_bytes=None)
    assert Machine.from_json(json.loads(json.dumps(machine.to_json()))) == machine
    assert machine.description == "1 × NVIDIA H200 (140.4 GiB)"


def test_the_versions_that_decide_a_figure_are_recorded() -> None:
    versions = software_versions()
    assert {"python", "torch", "deepspeed", "transformers"} <= set(versions)
    assert "not installed" not in (versions["torch"], versions["deepspeed"])


FOUR_GPUS = "".join(f"NVIDIA H100 80GB HBM3, 81559, 9.0, {index}, GPU-{index}{index}{index}\n" for index in range(4))


@pytest.mark.parametrize(
    ("visible", "gpus", "expected"),
    [
        (None, None, ()),
        ("0,1", None, ()),
        ("2,3", None, ("2", "3")),
        ("3,1", None, ("3", "1")),
        ("2,3", 1, ("2",)),
        ("GPU-222", None, ("GPU-222",)),
    ],
)
def test_the_machine_knows_its_gpus_by_the_names_that_cuda_was_given(
    nvidia_smi: NvidiaSmi, monkeypatch: pytest.MonkeyPatch, visible: str | None, gpus: int | None, expected: tuple[str]
) -> None:
    nvidia_smi(FOUR_GPUS)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine = detect_machine(gpus=gpus, cpu_ranks=2, memory_cap_bytes=None)
    assert machine.visible_devices == expected
    assert machine.device_ids == tuple(range(machine.ranks))
    assert Machine.from_json(json.loads(json.dumps(machine.to_json()))) == machine


def test_a_mig_instance_is_a_gpu_with_the_memory_of_its_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows").write_text("NVIDIA A100-SXM4-80GB, 81920, 8.0, 0, GPU-000\n")
    (tmp_path / "list").write_text(
        "GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-000)\n"
        "  MIG 3g.40gb     Device  0: (UUID: MIG-aaa)\n  MIG 1g.10gb     Device  1: (UUID: MIG-bbb)\n"
    )
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\n[ "$1" = -L ] && exec /bin/cat "{tmp_path}/list"\n/bin/cat "{tmp_path}/rows"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-bbb,MIG-aaa")
    machine = detect_machine(gpus=None, cpu_ranks=2, memory_cap_bytes=None)
    assert (machine.name, machine.ranks) == ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", 1)
    assert machine.visible_devices == ("MIG-bbb",)
    assert 9.4 * GIB < machine.memory_bytes < 9.8 * GIB
