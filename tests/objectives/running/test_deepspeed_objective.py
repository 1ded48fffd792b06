"""Real trials: every ZeRO stage, several ranks, several kinds of models and data; and how ranks are combined."""

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_tune.objectives.machine import Machine, detect_machine, visible_gpus
from ds_tune.objectives.running.deepspeed_objective import DeepSpeedObjective, combine_ranks
from ds_tune.objectives.running.local_launcher import LocalLauncher
from ds_tune.objectives.running.protocol import RankResult
from ds_tune.objectives.timing.step_plan import StepPlan
from ds_tune.objectives.trial import Failure, FailureKind, Measurement, Outcome, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

Train = Callable[..., Outcome]
Fault = Callable[[str], Path]

# gpt2-nano: token and position embeddings, 4 layers of 12 d^2 + 13 d, the last norm; d = 128.
NANO_PARAMETERS = (4096 + 256) * 128 + 4 * (12 * 128**2 + 13 * 128) + 2 * 128


def measured(outcome: Outcome) -> Measurement:
    assert isinstance(outcome, Measurement), outcome
    return outcome


def noted(note: Path, *, ranks: int = 2) -> list[dict[str, Any]]:
    """What the fault `inspect` read from the live engine and batch of each rank."""
    return [json.loads(Path(f"{note}.{rank}").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize(("zero_stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_a_trial_in_each_zero_stage_is_really_run_and_timed(
    train: Train, fault: Fault, workload: HuggingFaceWorkload, zero_stage: int, dtype: str
) -> None:
    note = fault("rank=* phase=forward kind=inspect")
    config = TrialConfig(zero_stage=zero_stage, micro_batch_size=2, gradient_accumulation_steps=3)
    measurement = measured(train(config, workload=dataclasses.replace(workload, dtype=dtype)))

    assert len(measurement.step_seconds) == 2
    assert len(measurement.warmup_step_seconds) == 1
    mean = statistics.fmean(measurement.step_seconds)
    assert measurement.samples_per_second == pytest.approx(2 * 2 * 3 / mean)
    low, high = measurement.samples_per_second_ci95
    assert 0 <= low <= measurement.samples_per_second <= high
    parts = measurement.forward_seconds + measurement.backward_seconds + measurement.optimizer_seconds
    assert 0 < parts <= mean
    assert measurement.deepspeed_samples_per_second is not None and measurement.deepspeed_samples_per_second > 0

    assert measurement.peak_memory_bytes > 100 * 2**20
    assert measurement.reserved_memory_bytes >= measurement.peak_memory_bytes
    assert measurement.model_parameters == NANO_PARAMETERS
    assert measurement.flops_per_sample == 32 * (6 * NANO_PARAMETERS + 12 * 4 * 128 * 32)
    assert 0 < measurement.setup_seconds < measurement.wall_seconds

    live, peer = noted(note)
    assert live["zero_stage"] == zero_stage
    assert live["micro_batch_size"] == 2
    assert live["gradient_accumulation_steps"] == 3
    assert live["dtypes"] == [{"fp32": "torch.float32", "bf16": "torch.bfloat16"}[dtype]]
    assert [len(row) for row in live["input_ids"]] == [32, 32]
    assert live["labels"] == live["input_ids"]
    assert live["input_ids"] != peer["input_ids"]


def test_four_ranks_take_four_times_the_samples(train: Train, machine: Machine, config: TrialConfig) -> None:
    measurement = measured(train(config, machine=dataclasses.replace(machine, ranks=4)))
    assert measurement.samples_per_second == pytest.approx(4 / statistics.fmean(measurement.step_seconds))


TINY = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}


@pytest.mark.parametrize(("model_type", "architecture"), [("llama", "LlamaForCausalLM"), ("bert", "BertForMaskedLM")])
def test_any_local_causal_or_masked_model_is_trained(
    train: Train, fault: Fault, workload: HuggingFaceWorkload, tmp_path: Path, model_type: str, architecture: str
) -> None:
    fields = {"model_type": model_type, "architectures": [architecture], "vocab_size": 512, **TINY}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(fields))
    note = fault("rank=* phase=forward kind=inspect")
    measured(train(workload=dataclasses.replace(workload, model=str(tmp_path / "model"))))
    assert noted(note)[0]["model"] == architecture


def test_pretrained_weights_and_the_user_s_text_are_what_is_trained(
    train: Train, fault: Fault, workload: HuggingFaceWorkload, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "saved"
    config = transformers.AutoConfig.for_model("gpt2", n_layer=2, n_embd=64, n_head=4, vocab_size=512, n_positions=64)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"input_ids": [n] * 32}) + "\n" for n in range(64)))
    note = fault("rank=* phase=forward kind=inspect")
    measured(
        train(
            TrialConfig(zero_stage=3, micro_batch_size=2, gradient_accumulation_steps=1),
            workload=dataclasses.replace(
                workload, model=str(folder), pretrained=True, dataset=str(tmp_path / "ids.jsonl")
            ),
        )
    )
    rows = [row for rank in noted(note) for row in rank["input_ids"]]
    assert all(len(set(row)) == 1 for row in rows)  # blocks of the file, not synthetic tokens
    assert len({row[0] for row in rows}) == 4  # and no block twice


def test_prepare_starts_the_ranks_that_the_first_trial_uses(
    objective: Callable[..., DeepSpeedObjective],
    config: TrialConfig,
    tmp_path: Path,
    started_ranks: Callable[[], list[Any]],
) -> None:
    ready = objective(imports=True)
    ready.prepare()
    ranks = started_ranks()
    assert len(ranks) == 2
    phases: list[str] = []
    measurement = measured(ready.run(config, tmp_path, phases.append))
    assert phases == ["config", "model", "engine", "warm-up", "timed steps"]
    assert measurement.setup_seconds > measurement.wall_seconds  # the start was before the trial
    assert {rank.pid for rank in started_ranks()} == {rank.pid for rank in ranks}
    assert (tmp_path / "stderr.log").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["stderr.log", "stdout.log"]
    ready.close()
    assert started_ranks() == []


def test_the_slowest_rank_s_times_and_the_highest_memory_make_the_measurement(
    config: TrialConfig, rank_result: RankResult
) -> None:
    slow = dataclasses.replace(
        rank_result,
        step_seconds=(2.0, 1.5),
        step_ci95_seconds=(1.5, 2.0),
        forward_seconds=0.75,
        setup_seconds=3.0,
        tokens_per_sample=25.5,
    )
    hungry = dataclasses.replace(rank_result, peak_memory_bytes=30, reserved_memory_bytes=40, alloc_retries=2)
    measurement = combine_ranks([rank_result, slow, hungry], config=config, start_seconds=5.0, wall_seconds=20.0)
    assert measurement.step_seconds == (2.0, 1.5)
    assert measurement.forward_seconds == 0.75
    assert measurement.samples_per_second == pytest.approx(3 / 1.75)
    assert measurement.samples_per_second_ci95 == pytest.approx((3 / 2.0, 3 / 1.5))
    assert measurement.tokens_per_second == pytest.approx(25.5 * 3 / 1.75)
    assert (measurement.peak_memory_bytes, measurement.reserved_memory_bytes) == (30, 40)
    assert measurement.alloc_retries == 2
    assert measurement.setup_seconds == 9.0
    assert measurement.wall_seconds == 20.0


@pytest.mark.gpu
def test_a_trial_on_a_gpu_is_measured(workload: HuggingFaceWorkload, config: TrialConfig, tmp_path: Path) -> None:
    machine = detect_machine(gpus=1, cpu_ranks=2, memory_cap_bytes=None)
    measurement = measured(run_on(machine, dataclasses.replace(workload, dtype="fp16"), config, tmp_path))
    assert measurement.samples_per_second > 0
    assert 0 < measurement.peak_memory_bytes <= measurement.reserved_memory_bytes <= machine.memory_bytes


@pytest.mark.gpu
def test_a_memory_cap_on_a_gpu_is_what_a_trial_really_has(workload: HuggingFaceWorkload, tmp_path: Path) -> None:
    cap = 2**30
    machine = detect_machine(gpus=1, cpu_ranks=2, memory_cap_bytes=cap)
    config = TrialConfig(zero_stage=1, micro_batch_size=4096, gradient_accumulation_steps=1)
    outcome = run_on(machine, dataclasses.replace(workload, dtype="bf16"), config, tmp_path)
    assert isinstance(outcome, Failure), outcome
    assert outcome.kind == FailureKind.OUT_OF_MEMORY
    assert outcome.phase in ("forward", "backward")
    assert outcome.peak_memory_bytes is not None and outcome.peak_memory_bytes <= cap


@pytest.mark.gpu
@pytest.mark.parametrize(
    "knobs",
    [
        {"loss_computation": "chunked", "padded_vocabulary": 64},
        {"attention": "sdpa_flash"},
        {"attention": "sdpa_efficient"},
        {"attention": "sdpa_cudnn"},
        {"precision": "bf16"},
        {"vocabulary": 64},
        {"compile": "deepcompile", "zero_stage": 2, "gradient_accumulation_steps": 2},
        {"compile": "deepcompile", "zero_stage": 3},
        {"offload_parameters": "cpu", "zero_stage": 3},
        {"offload_optimizer": "cpu_half", "zero_stage": 3},
    ],
    ids=str,
)
def test_each_knob_that_a_cpu_cannot_show_trains_on_a_gpu(
    knobs: dict[str, Any], workload: HuggingFaceWorkload, tmp_path: Path
) -> None:
    machine = detect_machine(gpus=1, cpu_ranks=2, memory_cap_bytes=None)
    config = TrialConfig(**{"zero_stage": 1, "micro_batch_size": 2, "gradient_accumulation_steps": 1} | knobs)
    measured(run_on(machine, dataclasses.replace(workload, dtype="fp16"), config, tmp_path))


@pytest.mark.gpu
@pytest.mark.parametrize(("knobs", "gpus"), [({"quantized_weights": "on"}, 2), ({"parameter_group": 2}, 4)], ids=str)
def test_each_knob_that_needs_several_gpus_trains_on_them(
    knobs: dict[str, Any], gpus: int, workload: HuggingFaceWorkload, tmp_path: Path
) -> None:
    if len(visible_gpus()) < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    machine = detect_machine(gpus=gpus, cpu_ranks=2, memory_cap_bytes=None)
    config = TrialConfig(zero_stage=3, micro_batch_size=2, gradient_accumulation_steps=1, **knobs)
    measured(run_on(machine, dataclasses.replace(workload, dtype="fp16"), config, tmp_path))


def run_on(machine: Machine, workload: HuggingFaceWorkload, config: TrialConfig, folder: Path) -> Outcome:
    launcher = LocalLauncher(machine)
    objective = DeepSpeedObjective(
        workload,
        machine,
        launcher=launcher,
        log_folder=folder,
        trial_seconds=300,
        plan=StepPlan(min_timed_steps=5, max_timed_steps=5),
    )
    try:
        return objective.run(config, folder, lambda phase: None)
    finally:
        objective.close()
        launcher.close()
