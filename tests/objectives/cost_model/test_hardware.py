"""Hardware is named in words, recognised by what `nvidia-smi` calls it, and never mistaken for another."""

import dataclasses

import pytest

from ds_tune.objectives.cost_model.hardware import (
    CATALOGUE,
    SOLD_AS_GB,
    Accelerator,
    Hardware,
    hardware_of,
    machine_of,
    parse_hardware,
)
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.machine import GIB, Machine

MIB = 2**20


def machine(name: str, mib: int, ranks: int = 1) -> Machine:
    return Machine(device="cuda", name=name, ranks=ranks, device_ids=tuple(range(ranks)), memory_bytes=mib * MIB)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("16xV100-32GB", "16xV100-32GB"),
        ("2xH200", "2xH200"),
        ("H200", "1xH200"),
        ("8×a100-80gb", "8xA100-80GB"),
        (" 4 x A100 40GB ", "4xA100-40GB"),
        ("RTX4090", "1xRTX4090"),
        ("2xNVIDIA GeForce RTX 4090", "2xRTX4090"),
        ("L4", "1xL4"),  # not the beginning of L40S
        ("A10", "1xA10"),  # nor of A100
        ("L40", "1xL40S"),  # the only one that begins so
        ("1xH100-80GB", "1xH100"),  # the size that it is sold with, although there is no other
        ("2 x h200 141gb", "2xH200"),
        ("RTX 4090 24G", "1xRTX4090"),
        ("8xB200-180GB", "8xB200"),
        ("8xB200-192GB", "8xB200"),
        ("T4_16GiB", "1xT4"),
        ("L40-48GB", "1xL40S"),
    ],
)
def test_a_number_and_a_gpu_are_read_as_people_write_them(text: str, name: str) -> None:
    hardware = parse_hardware(text)
    assert hardware.name == name
    assert hardware.is_known and hardware.device == "cuda"
    assert hardware.capacity_bytes == CATALOGUE[hardware.accelerator.name].memory_bytes


@pytest.mark.parametrize(
    ("text", "candidates"),
    [
        ("16xV100", ["V100-16GB", "V100-32GB"]),
        ("a100", ["A100-40GB", "A100-80GB"]),
        ("RTX", ["RTX3090", "RTX4090", "RTX5090"]),
    ],
)
def test_ambiguous_gpu_name_is_refused_with_its_candidates(text: str, candidates: list[str]) -> None:
    with pytest.raises(UsageError, match=f"`hardware={text}`: .*say which: {', '.join(candidates)}$"):
        parse_hardware(text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1xH100-94GB", "no H100 with 94 GB is known; write H100-80GB"),
        ("B200-80GB", "no B200 with 80 GB is known; write B200-180GB or B200-192GB"),
        ("V100-64GB", "no V100 with 64 GB is known; write V100-16GB or V100-32GB"),
        ("A100 24GB", "no A100 with 24 GB is known; write A100-40GB or A100-80GB"),
        ("RTX-24GB", "write a number and a GPU, such as 16xV100-32GB; say which: RTX3090, RTX4090"),
    ],
)
def test_a_size_that_there_is_not_is_answered_with_those_that_there_are(text: str, sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_hardware(text)
    assert str(refused.value) == f"`hardware={text}`: {sentence}"


@pytest.mark.parametrize(
    "chip", [chip for name, chip in CATALOGUE.items() if "-" not in name], ids=lambda chip: chip.name
)
def test_a_size_it_is_sold_with_is_near_what_can_be_allocated(chip: Accelerator) -> None:
    for gb in SOLD_AS_GB[chip.name]:
        assert 0.9 * gb <= chip.memory_bytes / GIB < gb


@pytest.mark.parametrize(
    "text", ["8xMI300X", "8xMI300X-192GB", "H300", "2*H200", "H200x2", "1.5xH200", "-1xH200", "x", "3x"]
)
def test_unknown_hardware_is_refused_with_all_known_gpus(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_hardware(text)
    assert str(refused.value).startswith(f"`hardware={text}`: write a number and a GPU, such as 16xV100-32GB; ")
    assert str(refused.value).endswith(f"known are {', '.join(CATALOGUE)}")


@pytest.mark.parametrize("text", ["", "nvidia", "0xH200"])
def test_no_gpu_is_no_hardware(text: str) -> None:
    with pytest.raises(UsageError, match="`hardware="):
        parse_hardware(text)


@pytest.mark.parametrize("count", ["99999999999", "1048577", "9" * 5000])
def test_more_gpus_than_there_are_anywhere_are_refused(count: str) -> None:
    with pytest.raises(UsageError, match=r"^`hardware='?\d+(xH100|…)`: no more than 1048576 GPUs$") as refused:
        parse_hardware(f"{count}xH100")
    assert len(str(refused.value)) < 120
    assert parse_hardware("1048576xH100").ranks == 2**20


def test_a_cap_leaves_a_rank_less_memory_and_the_gpu_as_fast() -> None:
    capped = parse_hardware("2xH200", memory_cap_bytes=24 * GIB)
    assert capped.capacity_bytes == 24 * GIB
    assert capped.accelerator == parse_hardware("2xH200").accelerator


@pytest.mark.parametrize(
    ("ranks", "full_gib"),
    # What torch reported free for tensors on H100s: 79.18 GiB in all, less what the process held besides its own.
    [(1, 79.18 - 1.67), (2, 79.18 - 2.05)],
)
def test_not_all_of_a_device_is_for_tensors(ranks: int, full_gib: float) -> None:
    hardware = hardware_of(machine("NVIDIA H100 80GB HBM3", 81559, ranks=ranks))
    assert (hardware.capacity_bytes - hardware.outside_bytes) / GIB == pytest.approx(full_gib, abs=0.2)


def test_a_cap_is_for_tensors_as_far_as_the_device_has_room_for_the_rest() -> None:
    assert parse_hardware("2xH200", memory_cap_bytes=80 * GIB).outside_bytes == 0
    near = parse_hardware("2xH200", memory_cap_bytes=139 * GIB)
    assert near.capacity_bytes - near.outside_bytes == pytest.approx((139.8 - 2.1) * GIB)


def test_memory_outside_tensors_on_a_24_gb_gpu_is_5_percent() -> None:
    assert parse_hardware("4xRTX4090").outside_bytes == pytest.approx(0.05 * 23.6 * GIB)


def test_a_cpu_rank_has_all_of_its_memory() -> None:
    cpu = Machine(device="cpu", name="CPU", ranks=2, memory_bytes=8 * GIB)
    assert hardware_of(cpu).outside_bytes == 0


def test_a_cap_of_more_than_there_is_is_refused() -> None:
    has = CATALOGUE["V100-32GB"].memory_bytes
    assert parse_hardware("V100-32GB", memory_cap_bytes=has).capacity_bytes == has
    with pytest.raises(UsageError, match=r"`memory_cap` is more than an? V100-32GB has \(31\.7 GiB\)"):
        parse_hardware("V100-32GB", memory_cap_bytes=32 * GIB)


@pytest.mark.parametrize(
    ("name", "mib", "known"),
    [
        ("NVIDIA H200", 143771, "H200"),
        ("NVIDIA H100 80GB HBM3", 81559, "H100"),
        ("NVIDIA H100 PCIe", 81559, "H100"),
        ("Tesla V100-SXM3-32GB", 32510, "V100-32GB"),
        ("Tesla V100-SXM2-16GB", 16160, "V100-16GB"),
        ("Tesla V100-PCIE-32GB", 32510, "V100-32GB"),
        ("NVIDIA A100-SXM4-40GB", 40960, "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", 81920, "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", 81920, "A100-80GB"),
        ("NVIDIA A10G", 23028, "A10"),
        ("NVIDIA A10", 23028, "A10"),
        ("NVIDIA RTX A6000", 49140, "A6000"),
        ("Tesla T4", 15360, "T4"),
        ("NVIDIA L4", 23034, "L4"),
        ("NVIDIA L40S", 46068, "L40S"),
        ("NVIDIA B200", 183359, "B200"),
        ("NVIDIA GeForce RTX 3090", 24576, "RTX3090"),
        ("NVIDIA GeForce RTX 4090", 24564, "RTX4090"),
        ("NVIDIA GeForce RTX 5090", 32607, "RTX5090"),
    ],
)
def test_the_names_of_nvidia_smi_are_recognised(name: str, mib: int, known: str) -> None:
    hardware = hardware_of(machine(name, mib, ranks=2))
    assert hardware.is_known
    assert hardware.accelerator == CATALOGUE[known]
    # What the machine has is told by the machine, not by the data sheet.
    assert (hardware.ranks, hardware.capacity_bytes) == (2, mib * MIB)


@pytest.mark.parametrize(
    ("name", "mib", "like"),
    [
        ("NVIDIA RTX 6000 Ada Generation", 49140, "A6000"),
        ("NVIDIA H20", 97871, "A100-80GB"),
        ("NVIDIA A30", 24576, "RTX3090"),
        ("AMD Instinct MI300X", 196592, "B200"),
    ],
)
def test_an_unknown_gpu_keeps_its_name_and_is_guessed_to_be_like_the_one_nearest_in_memory(
    name: str, mib: int, like: str
) -> None:
    hardware = hardware_of(machine(name, mib, ranks=4))
    assert not hardware.is_known
    assert hardware.name == f"4x{name}"
    assert hardware.capacity_bytes == mib * MIB
    assert hardware.accelerator == dataclasses.replace(CATALOGUE[like], name=name, memory_bytes=mib * MIB)


def test_a_cpu_is_hardware_too_and_far_slower() -> None:
    hardware = hardware_of(Machine(device="cpu", name="AMD EPYC", ranks=2, memory_bytes=8 * GIB))
    assert (hardware.device, hardware.name, hardware.capacity_bytes) == ("cpu", "2xCPU", 8 * GIB)
    assert hardware.accelerator.peak_flops("fp32") < min(each.single_flops for each in CATALOGUE.values()) / 100


@pytest.mark.parametrize("cap_bytes", [None, 8 * GIB], ids=["uncapped", "capped"])
@pytest.mark.parametrize("name", CATALOGUE)
def test_imagined_hardware_as_a_machine_is_the_same_hardware_again(name: str, cap_bytes: int | None) -> None:
    hardware = parse_hardware(f"4x{name}", memory_cap_bytes=cap_bytes)
    imagined = machine_of(hardware)
    assert hardware_of(imagined) == hardware
    assert (imagined.ranks, imagined.capacity_bytes) == (4, hardware.capacity_bytes)
    assert imagined.memory_cap_bytes == cap_bytes


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_figures_of_the_catalogue_are_of_the_order_of_a_gpus(name: str) -> None:
    known = CATALOGUE[name]
    assert 14 * GIB < known.memory_bytes < 200 * GIB
    assert known.peak_flops("fp16") == known.peak_flops("bf16") > known.peak_flops("fp32") > 1e12
    assert 1e9 < known.link_bandwidth < known.memory_bandwidth < 1e13


def test_only_gpus_before_ampere_lack_bf16() -> None:
    assert {name for name, known in CATALOGUE.items() if not known.has_bf16} == {"V100-16GB", "V100-32GB", "T4"}


def test_a_recording_says_what_a_rank_was_allowed() -> None:
    """A surface recorded under a cap has no other memory than the cap; the GPU is still that GPU."""
    recorded = Machine(device="cuda", name="H200", ranks=2, device_ids=(0, 1), memory_bytes=24 * GIB)
    assert hardware_of(recorded) == Hardware(accelerator=CATALOGUE["H200"], ranks=2, capacity_bytes=24 * GIB)
