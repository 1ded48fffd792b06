"""Knobs that only show on several ranks: four real ones on the CPU, under ZeRO-3."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("four_ranks.py")
REPOSITORY = Path(__file__).parents[3]


def trained(folder: Path, **knobs: Any) -> list[dict[str, Any]]:
    """What each rank tells of a training with these knobs."""
    folder.mkdir()
    processes = []
    try:
        for rank in range(4):
            environment = {
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4", "DS_ACCELERATOR": "cpu",
                "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo",
                "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            command = [sys.executable, str(SCRIPT), str(folder / "rendezvous"), str(folder / f"{rank}.json"),
                       json.dumps(knobs | {"dropout": "none"})]  # fmt: skip
            with (folder / f"{rank}.log").open("w") as log:
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        statuses = [process.wait(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert statuses == [0] * 4, (folder / "0.log").read_text()[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Without any knob."""
    return trained(tmp_path_factory.mktemp("ranks") / "plain")


def test_groups_of_ranks_keep_a_copy_of_the_parameters_and_the_loss_stays(
    plain: list[dict[str, Any]], tmp_path: Path
) -> None:
    grouped = trained(tmp_path / "grouped", parameter_group=2)
    for rank, (one, other) in enumerate(zip(plain, grouped, strict=True)):
        assert (one["group_size"], one["group_partition"]) == (1, None)
        assert other["group_size"] == 2
        assert other["partition"] == one["partition"] == other["elements"] // 4
        assert other["group_partition"] == other["elements"] // 2
        assert other["losses"] == pytest.approx(one["losses"], abs=1e-5), rank
    assert plain[0]["losses"] != plain[1]["losses"]


def test_the_loss_in_chunks_is_the_same_where_the_projection_has_to_be_gathered(
    plain: list[dict[str, Any]], tmp_path: Path
) -> None:
    chunked = trained(tmp_path / "chunked", loss_computation="chunked", padded_vocabulary=64)
    assert plain[0]["partition"] < plain[0]["elements"]
    for one, other in zip(plain, chunked, strict=True):
        assert other["losses"] == pytest.approx(one["losses"], abs=1e-5)
