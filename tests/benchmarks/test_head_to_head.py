"""The comparison with DeepSpeed's autotuner: what it decides, what it resumes, and a real one on two CPU ranks."""

import dataclasses
import importlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ds_tune.objectives.ds_config import deepspeed_config
from ds_tune.objectives.ds_document import NEVER_PRINT
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.machine import GIB
from ds_tune.objectives.trial import Failure, FailureKind, Measurement, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Run = Callable[..., subprocess.CompletedProcess[str]]
NAMES = ["deepspeed", "core", "speed"]


def module(name: str) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module(name)


@pytest.fixture(scope="module")
def comparison() -> Iterator[ModuleType]:
    yield from module("comparison")


@pytest.fixture(scope="module")
def autotuner_results() -> Iterator[ModuleType]:
    yield from module("autotuner_results")


MEASUREMENT = Measurement(
    step_seconds=(0.1, 0.1), samples_per_second=50.0, samples_per_second_ci95=(49.9, 50.1), forward_seconds=0.0,
    backward_seconds=0.0, optimizer_seconds=0.0, deepspeed_samples_per_second=None, warmup_step_seconds=(),
    skipped_steps=0, peak_memory_bytes=2 * GIB, reserved_memory_bytes=2 * GIB, alloc_retries=0, setup_seconds=1.0,
    wall_seconds=2.0, model_parameters=1, flops_per_sample=1.0,
)  # fmt: skip


def run_of(name: str, turn: int, rate: float | None, *, wall: float = 10.0) -> dict[str, Any]:
    """A line of the verification; without a rate a run that failed."""
    failure = Failure(kind=FailureKind.OUT_OF_MEMORY, message="out of memory", phase="forward")
    outcome: Measurement | Failure = failure
    if rate is not None:
        interval = (rate * 0.999, rate * 1.001)
        outcome = dataclasses.replace(MEASUREMENT, samples_per_second=rate, samples_per_second_ci95=interval)
    return {"contestant": name, "round": turn, "wall_seconds": wall, "outcome": outcome.to_json()}


def test_the_order_turns_from_round_to_round_and_goes_on_where_it_was(comparison: ModuleType) -> None:
    runs: list[dict[str, Any]] = []
    while (turn := comparison.next_run(NAMES, runs, 3)) is not None:
        runs.append(run_of(turn[1], turn[0], 50.0))
        runs = json.loads(json.dumps(runs))
    assert [run["contestant"] for run in runs] == [*NAMES, *NAMES[::-1], *NAMES]
    assert comparison.next_run(NAMES, runs, 4) == (3, "speed")


def test_a_run_that_failed_is_not_tried_again_in_its_round(comparison: ModuleType) -> None:
    assert comparison.next_run(NAMES, [run_of("deepspeed", 0, None)], 1) == (0, "core")


def test_the_next_run_is_taken_to_need_somewhat_more_than_the_longest(comparison: ModuleType) -> None:
    assert comparison.run_seconds([]) == pytest.approx(90)
    runs = [run_of("core", 0, 50.0, wall=20.0), run_of("core", 1, 50.0, wall=40.0)]
    assert comparison.run_seconds(runs) == pytest.approx(52)


def test_few_runs_that_agree_by_chance_are_not_taken_at_their_word(comparison: ModuleType) -> None:
    runs = [run_of("core", turn, 50.0) for turn in range(3)]
    rate = comparison.rate_of("core", runs)
    low, high = rate.samples_per_second_ci95
    assert rate.samples_per_second == pytest.approx(50.0)
    assert (rate.runs, rate.peak_memory_bytes) == (3, 2 * GIB)
    # 0.5% between runs and 0.1% within: 1.96 * hypot(0.5%, 0.051%) / sqrt(3)
    assert (low, high) == pytest.approx((50 * 0.99433, 50 * 1.0057), rel=1e-4)


def test_runs_that_lie_apart_give_student_s_interval(comparison: ModuleType) -> None:
    rate = comparison.rate_of("core", [run_of("core", turn, value) for turn, value in enumerate((45.0, 50.0, 55.0))])
    low, high = rate.samples_per_second_ci95
    assert rate.samples_per_second == pytest.approx((45 * 50 * 55) ** (1 / 3))
    assert low < 40 and high > 60  # 4.3 standard errors of 6% each way


def test_a_failed_run_is_counted_but_gives_no_rate(comparison: ModuleType) -> None:
    runs = [run_of("core", 0, None), run_of("core", 1, 50.0), run_of("speed", 0, None)]
    assert comparison.rate_of("core", runs).runs == 1
    assert comparison.rate_of("speed", runs) is None


def row(name: str, **differing: Any) -> dict[str, Any]:
    winner = {"name": "z1_gas1_tmbspg8", "global_batch": 32}
    counts = {"trials": 9, "out_of_memory": 1}
    return {"name": name, "winner": winner, "tuning_seconds": 61.6, "calls": 1, "done": True, **counts, **differing}


def cells(table: str, name: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_each_contestant_beside_the_autotuner(comparison: ModuleType) -> None:
    runs = [run_of(name, turn, rate) for turn in range(3) for name, rate in (("deepspeed", 40.0), ("core", 50.0))]
    runs.append(run_of("speed", 0, None))
    rows = [row("deepspeed", calls=2), row("core"), row("speed", done=False, winner=None)]
    table = comparison.table(rows, runs)
    assert cells(table, "deepspeed")[2:6] == ["40.00 (39.77–40.23)", "1", "3 of 3", "62 (2 calls)"]
    assert cells(table, "core") == [
        *("core", "z1_gas1_tmbspg8", "50.00 (49.72–50.29)", "1.25 (1.24–1.26)", "3 of 3", "62", "9", "1", "2.00", "32"),
    ]
    assert cells(table, "speed") == ["speed", "–", "–", "–", "0 of 1", "62, unfinished", "9", "1", "–", "–"]


def test_without_the_autotuner_there_is_nothing_to_be_faster_than(comparison: ModuleType) -> None:
    assert cells(comparison.table([row("core")], [run_of("core", 0, 50.0)]), "core")[3] == "–"


GPU_WINNER = {
    "fp16": {"enabled": True, "loss_scale_window": 500},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
    "gradient_clipping": 1.0,
    "steps_per_print": 10,
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 5e7, "offload_optimizer": {"device": "cpu"}},
    "train_micro_batch_size_per_gpu": 11,
    "gradient_accumulation_steps": 2,
    "train_batch_size": 44,
}


def written(comparison: ModuleType, ds_config: dict[str, Any], dtype: str, device: str) -> dict[str, Any]:
    """What a rank is given of a winner that went through a TrialConfig."""
    config, base = comparison.trial_of(ds_config, device)
    workload = HuggingFaceWorkload(model="gpt2-nano", seq_len=32, dtype=dtype, base_ds_config=base)
    return deepspeed_config(config, workload, ranks=2, device=device)


def test_a_winner_s_configuration_is_run_with_nothing_lost_or_added(comparison: ModuleType) -> None:
    config, _ = comparison.trial_of(GPU_WINNER, "cuda")
    assert config == TrialConfig(
        zero_stage=1, micro_batch_size=11, gradient_accumulation_steps=2, offload_optimizer="cpu"
    )
    assert written(comparison, GPU_WINNER, "fp16", "cuda") == {**GPU_WINNER, "steps_per_print": NEVER_PRINT}


def test_on_a_cpu_the_autotuner_s_winner_keeps_deepspeed_s_buckets(comparison: ModuleType) -> None:
    winner = {key: value for key, value in GPU_WINNER.items() if key != "fp16"}
    winner["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}}
    winner["zero_optimization"] = {"stage": 2}
    assert written(comparison, winner, "fp32", "cpu") == {
        **winner,
        "steps_per_print": NEVER_PRINT,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 500_000_000, "allgather_bucket_size": 500_000_000},
    }


def test_tuning_seconds_are_added_up_over_calls_without_what_was_lost(comparison: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "core.sessions.json"
    first = comparison.Sessions(path)
    first.begin(["tune"])
    first.end("cut", first.all[-1]["began"] + 100, lost_seconds=30)
    again = comparison.Sessions(path)
    again.begin(["tune"])
    assert not first.is_open
    killed = comparison.Sessions(path)
    assert killed.is_open and not killed.done
    (tmp_path / "core" / "trial").mkdir(parents=True)
    log = tmp_path / "core" / "trial" / "stderr.log"
    log.touch()
    os.utime(log, (killed.all[-1]["began"] + 20, killed.all[-1]["began"] + 20))
    killed.end("killed", comparison.last_written(tmp_path / "core", killed.all[-1]["began"]))
    killed.finish()
    done = comparison.Sessions(path)
    assert done.done
    assert done.seconds == pytest.approx(90)
    assert [session["how"] for session in done.all] == ["cut", "killed"]


def test_a_line_that_was_half_written_is_as_if_it_never_were(comparison: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "verification.jsonl"
    comparison.Runs(path).add(**run_of("core", 0, 50.0))
    with path.open("a") as file:
        file.write('{"contestant": "sp')
    runs = comparison.Runs(path)
    runs.add(**run_of("speed", 0, 51.0))
    assert [run["contestant"] for run in comparison.Runs(path).all] == ["core", "speed"]


def test_a_folder_of_another_comparison_is_refused(comparison: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "asked.json"
    comparison.claim(path, {"trials": {"core": 9}, "ids": (0, 1)})
    comparison.claim(path, {"trials": {"core": 9}, "ids": (0, 1)})
    with pytest.raises(UsageError, match=r"holds another comparison \(trials .*9.* there, .*5.* here\)"):
        comparison.claim(path, {"trials": {"core": 5}, "ids": (0, 1)})


def experiment(results: Path, name: str, began: float, *, ended: bool) -> Path:
    folder = results / name
    folder.mkdir(parents=True)
    (folder / "exp.json").write_text("{}")
    os.utime(folder / "exp.json", (began, began))
    if ended:
        (folder / "metrics.json").write_text('{"throughput": 5.0}')
    return folder


def test_the_experiment_that_was_cut_off_is_not_built_on(autotuner_results: ModuleType, tmp_path: Path) -> None:
    assert autotuner_results.cut_experiment(tmp_path) is None
    experiment(tmp_path, "profile_model_info", 100, ended=False)
    experiment(tmp_path, "z0_gas1_tmbspg64", 120, ended=False)  # ran out of memory
    experiment(tmp_path, "z0_gas1_tmbspg1", 140, ended=True)
    assert autotuner_results.cut_experiment(tmp_path) is None
    cut = experiment(tmp_path, "z0_gas1_tmbspg8", 160, ended=False)
    assert autotuner_results.cut_experiment(tmp_path) == cut


@pytest.mark.parametrize(
    ("began", "resumed", "cut", "lost"),
    [
        (90, False, True, 15),  # the experiment that was cut off: 160 to 175
        (130, True, True, 10 + 15),  # and starting again: 130 to 140
        (130, True, False, 10),
        (90, False, False, 0),
        (170, True, True, 5),  # nothing was begun
    ],
)
def test_autotuner_s_lost_seconds_are_its_cut_off_experiment_and_its_restart(
    autotuner_results: ModuleType, tmp_path: Path, began: float, resumed: bool, cut: bool, lost: float
) -> None:
    experiment(tmp_path, "z0_gas1_tmbspg1", 100, ended=True)
    experiment(tmp_path, "z0_gas1_tmbspg16", 140, ended=True)
    experiment(tmp_path, "z0_gas1_tmbspg8", 160, ended=False)
    assert autotuner_results.lost_seconds(tmp_path, began, 175, resumed=resumed, cut=cut) == lost


CALLED = ["deepspeed", "core", "matched"]


@pytest.fixture
def call(run_script: Run, tmp_path: Path) -> Run:
    """One call of the script on two CPU ranks."""

    def call(*options: str) -> subprocess.CompletedProcess[str]:
        few = ["--contestants", *CALLED, "--core-trials", "2", "--wide-trials", "1", "--rounds", "1"]
        small = ["--out", str(tmp_path / "out"), "--gpus", "0", "--seq-len", "16"]
        # The autotuner profiles the model and tries one configuration, each in 20 s on an idle machine.
        small += ["--stage", "default", "--global-batch", "2"]
        return run_script(BENCHMARKS / "head_to_head.py", *small, *few, *options)

    return call


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_head_to_head_cut_off_by_its_time_limit_goes_on_and_completes_the_comparison(call: Run, tmp_path: Path) -> None:
    cut = call("--call-seconds", "8")
    assert cut.returncode == 130, cut.stderr
    assert "8 s are over: the same command goes on from here." in cut.stdout
    told = json.loads((tmp_path / "out" / "head_to_head.json").read_text())
    assert not told["complete"]

    done = call("--call-seconds", "1000")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "out" / "head_to_head.json").read_text())
    assert told["complete"]
    autotuner, core, matched = told["contestants"]
    assert (autotuner["calls"], core["calls"], matched["calls"]) == (2, 1, 1)
    assert autotuner["tuning_seconds"] > 0
    assert (core["trials"], core["out_of_memory"], core["failed"]) == (2, 0, 0)
    assert matched["winner"]["global_batch"] == autotuner["winner"]["global_batch"]
    assert [(run["contestant"], run["round"]) for run in told["verification"]] == [(name, 0) for name in CALLED]
    assert all(row["verified"]["samples_per_second"] > 0 for row in told["contestants"])
    assert core["over_the_autotuner"][0] > 0
    assert str(tmp_path) not in json.dumps(told)
    assert "| core " in done.stdout

    again = call()
    assert again.returncode == 0
    assert json.loads((tmp_path / "out" / "head_to_head.json").read_text())["verification"] == told["verification"]
    other = call("--core-trials", "3")
    assert other.returncode == 2
    assert "holds another comparison" in other.stderr


def test_there_is_no_batch_to_match_without_the_autotuner(call: Run) -> None:
    refused = call("--contestants", "core", "matched")
    assert refused.returncode == 2
    assert "--contestants matched needs deepspeed, whose global batch it takes" in refused.stderr
