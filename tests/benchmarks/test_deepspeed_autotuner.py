"""DeepSpeed's own autotuner, run for comparison: what is read of its files, and a real run on two CPU ranks."""

import dataclasses
import importlib.util
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "deepspeed_autotuner.py"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deepspeed_autotuner", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """What the autotuner leaves: a profile run, an experiment without a figure, two with, and one just begun."""

    def experiment(number: int, mbs: int, throughput: float | None, stderr: str | None = "") -> None:
        name = f"z0_gas1_tmbspg{mbs}"
        folder = tmp_path / name
        folder.mkdir()
        ds_config = {
            "zero_optimization": {"stage": 0},
            "train_micro_batch_size_per_gpu": mbs,
            "gradient_accumulation_steps": 1,
            "autotuning": {"enabled": True, "metric_path": f"{folder}/metrics.json"},
        }
        (folder / "ds_config.json").write_text(json.dumps(ds_config))
        (folder / "exp.json").write_text(json.dumps({"name": name, "exp_id": number, "ds_config": ds_config}))
        if stderr is not None:
            (folder / "stderr.log").write_text(stderr)
        if throughput is not None:
            (folder / "metrics.json").write_text(json.dumps({"latency": 1e6, "throughput": throughput}))

    profile = tmp_path / "profile_model_info"
    profile.mkdir()
    (profile / "exp.json").write_text(json.dumps({"name": profile.name, "exp_id": 0, "ds_config": {}}))
    experiment(10, 2, 20.5)
    experiment(2, 64, None, "[rank0]: Traceback\n[rank0]: torch.OutOfMemoryError: CUDA out of memory.\n")
    experiment(3, 1, 12.0)
    experiment(11, 4, None, None)
    (tmp_path / "z0_gas1_tmbspg8").mkdir()
    (tmp_path / "z0_gas1_tmbspg8" / "exp.json").write_text('{"name": "z0_')  # killed while it wrote
    return tmp_path


def test_experiments_are_read_in_order_with_the_metric_or_what_the_autotuner_takes_for_the_error(
    script: ModuleType, results: Path
) -> None:
    rows = script.experiments(results)
    assert [row["name"] for row in rows] == [
        "z0_gas1_tmbspg64",
        "z0_gas1_tmbspg1",
        "z0_gas1_tmbspg2",
        "z0_gas1_tmbspg4",
    ]
    assert [row["throughput"] for row in rows] == [None, 12.0, 20.5, None]
    assert [row["error"] for row in rows] == [
        "[rank0]: torch.OutOfMemoryError: CUDA out of memory.",
        None,
        None,
        None,
    ]
    assert rows[2] | {"name": "", "throughput": 0} == {
        "name": "",
        "zero_stage": 0,
        "mbs": 2,
        "gas": 1,
        "throughput": 0,
        "error": None,
        "out_of_memory": False,
    }
    assert [row["out_of_memory"] for row in rows] == [True, False, False, False]


def test_before_the_autotuner_has_chosen_the_winner_is_the_best_so_far(script: ModuleType, results: Path) -> None:
    won = script.winner(results, script.experiments(results))
    assert (won["name"], won["chosen_by"]) == ("z0_gas1_tmbspg2", "its metric so far")
    assert won["ds_config"]["train_micro_batch_size_per_gpu"] == 2
    assert "autotuning" not in won["ds_config"]


def test_autotuner_s_choice_is_the_winner_even_where_another_experiment_was_faster(
    script: ModuleType, results: Path
) -> None:
    chosen = json.loads((results / "z0_gas1_tmbspg1" / "ds_config.json").read_text())
    del chosen["autotuning"]
    (results / "ds_config_optimal.json").write_text(json.dumps(chosen))
    won = script.winner(results, script.experiments(results))
    assert won == {"name": "z0_gas1_tmbspg1", "chosen_by": "the autotuner", "ds_config": chosen}


def test_nothing_measured_has_no_winner(script: ModuleType, tmp_path: Path) -> None:
    assert script.winner(tmp_path, script.experiments(tmp_path)) is None


GPUS = Machine(device="cuda", name="NVIDIA H200", ranks=2, device_ids=(0, 1), memory_bytes=140 * GIB)


@pytest.mark.parametrize("stage", ["default", "all"])
def test_the_autotuner_gets_ds_tune_s_settings_without_those_that_are_tuned(script: ModuleType, stage: str) -> None:
    workload = HuggingFaceWorkload(model="gpt2-xl", seq_len=1024, dtype="fp16")
    zero = {} if stage == "default" else {"zero_optimization": {"stage": "all"}}
    assert script.user_config(workload, GPUS, stage) == {
        "fp16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
        "gradient_clipping": 1.0,
        "steps_per_print": 1_000_000_000,
        "autotuning": {"enabled": True, "fast": True},
        **zero,
    }


def test_a_global_batch_is_the_largest_that_the_autotuner_may_use(script: ModuleType) -> None:
    workload = HuggingFaceWorkload(model="gpt2-xl", seq_len=1024, dtype="fp16")
    assert script.user_config(workload, GPUS, "all", 64)["autotuning"] == {
        "enabled": True,
        "fast": True,
        "max_train_batch_size": 64,
    }


def test_a_memory_cap_holds_for_the_experiments_and_for_what_the_autotuner_believes(
    script: ModuleType, tmp_path: Path
) -> None:
    workload = HuggingFaceWorkload(model="gpt2-xl", seq_len=1024, dtype="fp16")
    capped = dataclasses.replace(GPUS, memory_cap_bytes=80 * GIB)
    bench = script.Bench(folder=tmp_path, workload=workload, machine=capped, stage="all")
    bench.write_files()
    assert f"total_memory = lambda device_index=None: {80 * GIB}" in (tmp_path / "tune.py").read_text()
    assert "cap_memory(machine)" in (tmp_path / "train.py").read_text()
    assert bench.launch(["--autotuning", "tune"], bench.ds_config_path)[1] == "tune.py"
    for name in ("train.py", "tune.py"):
        compile((tmp_path / name).read_text(), name, "exec")


def test_autotuner_run_clears_its_results_folder_unless_resumed(script: ModuleType, tmp_path: Path) -> None:
    workload = HuggingFaceWorkload(model="gpt2-xl", seq_len=1024, dtype="fp16")
    bench = script.Bench(folder=tmp_path, workload=workload, machine=GPUS, stage="all")
    done = tmp_path / "autotuning_results" / "z0_gas1_tmbspg1" / "metrics.json"
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    bench.write_files(resume=True)
    assert json.loads(bench.ds_config_path.read_text())["autotuning"]["overwrite"] is False
    assert done.exists()
    bench.write_files()
    assert json.loads(bench.ds_config_path.read_text())["autotuning"]["overwrite"] is True
    assert not done.exists()


def test_gpus_that_the_autotuner_would_not_take_are_refused(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    script.check_visible(GPUS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with pytest.raises(UsageError, match="always takes the machine's first GPUs"):
        script.check_visible(GPUS)


@pytest.fixture
def run(run_script: Run, tmp_path: Path) -> Run:
    """Runs the script on two CPU ranks."""

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return run_script(SCRIPT, "--out", str(tmp_path / "out.json"), "--gpus", "0", "--seq-len", "32", *options)

    return run


def document(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return read


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_autotuner_run_on_two_cpu_ranks_finds_a_winner_and_verifies_it(run: Run, tmp_path: Path) -> None:
    # At most 4 samples on two ranks: the smallest and the largest micro-batch are 1 and 2, and few are between.
    done = run("--global-batch", "4", "--timeout", "600", "--verify", "1")
    assert done.returncode == 0, done.stderr
    told = document(tmp_path)
    assert told["finished"]
    names = [row["name"] for row in told["experiments"]]
    assert {"z0_gas1_tmbspg1", "z0_gas1_tmbspg2"} <= set(names)
    assert all(row["throughput"] > 0 for row in told["experiments"])
    won = told["winner"]
    assert won["name"] in names
    assert won["chosen_by"] == "the autotuner"
    assert won["ds_config"]["zero_optimization"] == {"stage": 0}
    assert [rate > 0 for rate in told["verified_samples_per_second"]] == [True]
    assert "Traceback" not in (tmp_path / "out-files" / "autotuner.log").read_text()


@pytest.mark.slow
def test_at_its_timeout_the_autotuner_and_all_it_started_are_killed(run: Run, tmp_path: Path) -> None:
    done = run("--timeout", "6", "--stage", "all", "--verify", "1")
    assert done.returncode == 1
    told = document(tmp_path)
    assert not told["finished"]
    assert told["seconds"] >= 6
    assert (told["experiments"], told["winner"], told["verified_samples_per_second"]) == ([], None, [])
    assert "and 0 experiments: no winner" in done.stdout


def test_a_model_that_is_none_is_told_in_one_line(run: Run) -> None:
    done = run("--model", "gtp2")
    assert done.returncode == 2
    assert done.stderr.startswith("deepspeed_autotuner: --model gtp2 is neither")
    assert "Traceback" not in done.stderr
