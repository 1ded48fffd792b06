"""A whole study with real DeepSpeed on two CPU ranks while another job comes and goes on the same cores."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_tune.objectives.timing.intervals import ANSWER_FACTOR

pytestmark = pytest.mark.slow

BRIEFLY_VERIFYING = """
import sys
from ds_tune.tuner import __main__, verification
verification.BUDGET_SECONDS = 0.0
sys.exit(__main__.run())
"""
"""The command, whose verification goes on for as long as the search took, and not for two minutes at least: beside such
a neighbour it has never enough."""

NEIGHBOUR = """
import math, multiprocessing, time
def work():
    while True:
        until = time.monotonic() + 3
        while time.monotonic() < until:
            math.factorial(2000)
        time.sleep(4)
for _ in range({processes}):
    multiprocessing.Process(target=work, daemon=True).start()
print("working", flush=True)
time.sleep(900)
"""


@pytest.fixture
def neighbour() -> Iterator[subprocess.Popen[str]]:
    """A job that takes every core for 3 s of each 7 s."""
    script = NEIGHBOUR.format(processes=2 * (os.cpu_count() or 1))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True,
                          start_new_session=True) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        yield process
        os.killpg(process.pid, 9)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # several times as long where the machine is busy besides
def test_study_beside_another_job_ends_with_files_and_only_with_answers(
    neighbour: subprocess.Popen[str], tmp_path: Path
) -> None:
    command = [sys.executable, "-P", "-c", BRIEFLY_VERIFYING, "--gpus", "0", "--seq-len", "32", "--trials", "3",
               "--json", "--max-micro-batch", "4", "--max-global-batch", "16"]  # fmt: skip
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1000)
    assert finished.returncode == 0, finished.stderr
    document = json.loads(finished.stdout)
    results = tmp_path / "autotuning_results"
    assert {"summary.md", "summary.txt", "summary.json", "trials.csv", "ds_config_optimal.json"} <= set(
        os.listdir(results)
    )
    for trial in document["trials"]:
        for key in ("samples_per_second", "verified_samples_per_second"):
            if trial[key] is not None:
                low, high = trial[f"{key}_ci95"]
                assert 0 < low <= trial[key] <= high < math.inf
    low, high = document["speedup"]["ci95"]
    report = (results / "summary.md").read_text()
    if high > ANSWER_FACTOR * low:
        assert f"(95% interval {low:.2f}–{high:.2f})" in report
        assert f"{document['speedup']['factor']:.2f}×" not in report
        assert document["speedup"]["settled"] is False
    else:
        assert f"{document['speedup']['factor']:.2f}× (95% interval {low:.2f}–{high:.2f})" in report
    figures = {trial["name"]: trial["verified_samples_per_second"] for trial in document["trials"]}
    ratio = figures[document["best"]["name"]] / figures[document["baseline"]["name"]]
    assert document["speedup"]["factor"] == pytest.approx(ratio)
    if document["unsettled"]:
        assert f"{document['best']['name']} is not told from {', '.join(document['unsettled'])};" in report
    # The same command again reads what is stored, and says the same.
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert json.loads(again.stdout)["best"] == document["best"]
