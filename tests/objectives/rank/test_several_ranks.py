"""Knobs that only show on several ranks: four real ones on the CPU, under ZeRO-3."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("four_ranks.py")
REPOSITORY = Path(__file__).parents[3]
Trained: TypeAlias = Callable[[str], list[dict[str, Any]]]

TRAININGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"parameter_group": 2},
    "chunked": {"loss_computation": "chunked", "padded_vocabulary": 64},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """What each rank tells of a training of that name."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        **os.environ, "WORLD_SIZE": "4", "DS_ACCELERATOR": "cpu", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    trainings = json.dumps({name: knobs | {"dropout": "none"} for name, knobs in TRAININGS.items()})
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), trainings],
            env=environment,
            stdout=log,
            stderr=log,
            process_group=0,
        )
    try:
        process.wait(timeout=280)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def of(name: str) -> list[dict[str, Any]]:
        told = [folder / f"{name}.{rank}.json" for rank in range(4)]
        logs = [folder / "log", *folder.glob(f"{name}.*.log")]
        assert process.returncode == 0 and all(path.exists() for path in told), "\n".join(
            path.read_text()[-2000:] for path in logs
        )
        return [json.loads(path.read_text()) for path in told]

    return of


def test_groups_of_ranks_keep_a_copy_of_the_parameters_and_the_loss_stays(trained: Trained) -> None:
    plain, grouped = trained("plain"), trained("grouped")
    for rank, (one, other) in enumerate(zip(plain, grouped, strict=True)):
        assert (one["group_size"], one["group_partition"]) == (1, None)
        assert other["group_size"] == 2
        assert other["partition"] == one["partition"] == other["elements"] // 4
        assert other["group_partition"] == other["elements"] // 2
        assert other["losses"] == pytest.approx(one["losses"], abs=1e-5), rank
    assert plain[0]["losses"] != plain[1]["losses"]


def test_the_loss_in_chunks_is_the_same_where_the_projection_has_to_be_gathered(trained: Trained) -> None:
    plain, chunked = trained("plain"), trained("chunked")
    assert plain[0]["partition"] < plain[0]["elements"]
    for one, other in zip(plain, chunked, strict=True):
        assert other["losses"] == pytest.approx(one["losses"], abs=1e-5)
