"""Hardware as clouds, shops and nvidia-smi call it, and in several nodes."""

import pytest

from ds_tune.objectives.cost_model.hardware import CATALOGUE, hardware_of, machine_of, parse_hardware
from ds_tune.objectives.cost_model.hardware_names import ALIASES, INSTANCES, NEAR
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.machine import Machine


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "1xA100-80GB"),
        ("8xNVIDIA-A100-SXM4-80GB", "8xA100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "1xA100-40GB"),
        ("NVIDIA A100 80GB PCIe", "1xA100-80GB"),
        ("Tesla V100-SXM2-32GB", "1xV100-32GB"),
        ("4 x Tesla V100-PCIE-16GB", "4xV100-16GB"),
        ("H100 80GB HBM3", "1xH100"),
        ("8xNVIDIA H100 80GB HBM3", "8xH100"),
        ("NVIDIA H100 PCIe", "1xH100"),
        ("H100-SXM", "1xH100"),
        ("2xH100-SXM5-80GB", "2xH100"),
        ("NVIDIA H100 NVL", "1xH100"),
        ("NVIDIA H200", "1xH200"),
        ("NVIDIA A10G", "1xA10"),
        ("NVIDIA RTX A6000", "1xA6000"),
        ("Tesla T4", "1xT4"),
        ("NVIDIA L40S", "1xL40S"),
        ("NVIDIA GeForce RTX 4090", "1xRTX4090"),
        ("p4d.24xlarge", "8xA100-40GB"),
        ("P4DE.24xlarge", "8xA100-80GB"),
        ("p5.48xlarge", "8xH100"),
        ("g5.12xlarge", "4xA10"),
        ("a2-ultragpu-8g", "8xA100-80GB"),
        ("a2-megagpu-16g", "16xA100-40GB"),
        ("a3-highgpu-8g", "8xH100"),
        ("Standard_ND96isr_H100_v5", "8xH100"),
        ("2xp5.48xlarge", "2x8xH100"),
    ],
)
def test_names_of_nvidia_smi_and_of_clouds_are_understood(text: str, name: str) -> None:
    hardware = parse_hardware(text)
    assert hardware.name == name
    assert hardware.ranks == 16 or parse_hardware(hardware.name) == hardware


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("8xMI300X", "B200"), ("8xMI300X-192GB", "B200"), ("GH200", "H200"), ("NVIDIA GH200 480GB", "H200"),
        ("p4d.24xlage", "p4d.24xlarge"), ("a2-ultragpu-9g", "a2-ultragpu-"), ("RTX4080", "RTX4090"), ("H1000", "H100"),
    ],
)  # fmt: skip
def test_a_name_that_is_not_known_is_refused_with_the_nearest(text: str, near: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_hardware(text)
    assert f"nearest to that is {near}" in str(refused.value)
    assert str(refused.value).endswith(f"known are {', '.join(CATALOGUE)}")


def test_every_machine_of_a_cloud_has_gpus_of_the_catalogue() -> None:
    for gpu in [*(gpu for _, gpu in INSTANCES.values()), *ALIASES.values(), *NEAR.values()]:
        assert gpu in CATALOGUE


@pytest.mark.parametrize(
    ("text", "nodes", "ranks"),
    [
        ("8xH100", 1, 8), ("64xH100-80GB", 8, 64), ("8x8xH100-80GB", 8, 64), ("4x2xA100-80GB", 4, 8),
        ("16xV100-32GB", 1, 16), ("12xH100", 2, 12), ("1x16xH100", 1, 16), ("2xa2-megagpu-16g", 2, 32),
    ],
)  # fmt: skip
def test_gpus_are_in_as_many_nodes_as_is_said_or_in_nodes_of_eight(text: str, nodes: int, ranks: int) -> None:
    hardware = parse_hardware(text)
    assert (hardware.nodes, hardware.ranks) == (nodes, ranks)
    assert hardware_of(machine_of(hardware)) == hardware
    assert Machine.from_json(machine_of(hardware).to_json()).nodes == nodes
    words = hardware.nodes_words
    assert (words is None) == (nodes == 1)
    assert words is None or f"The {ranks} GPUs are taken for {nodes} nodes of " in words


def test_a_ring_over_nodes_is_as_fast_as_its_slowest_link() -> None:
    assert parse_hardware("8xH100").link_bandwidth == CATALOGUE["H100"].link_bandwidth
    assert parse_hardware("8x8xH100").link_bandwidth == 8 * 25e9
    assert parse_hardware("8x1xH100").link_bandwidth == 25e9
    assert parse_hardware("2x8xL4").link_bandwidth == CATALOGUE["L4"].link_bandwidth
