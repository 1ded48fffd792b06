"""What becomes of a trial whose ranks really fail: real DeepSpeed, real faults (see tests/faults).

Out of memory is real: at the phase named, the kernel stops giving a rank memory, and torch's or DeepSpeed's own next
allocation fails.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_tune.objectives.errors import EnvironmentFault, UsageError
from ds_tune.objectives.machine import Machine
from ds_tune.objectives.running.deepspeed_objective import DeepSpeedObjective
from ds_tune.objectives.trial import Failure, FailureKind, Outcome, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

Train = Callable[..., Outcome]
Fault = Callable[[str], Path]

MIB = 2**20


def failed(outcome: Outcome) -> Failure:
    assert isinstance(outcome, Failure), outcome
    assert outcome.wall_seconds > 0
    return outcome


@pytest.mark.parametrize(
    ("phase", "rank", "zero_stage", "micro_batch_size"),
    [
        ("model", "0", 3, 1),
        ("engine", "1", 2, 1),
        ("forward", "1", 1, 64),
        ("backward", "*", 1, 64),
        ("step", "1", 0, 1),
    ],
)
def test_running_out_of_memory_is_told_as_that_with_phase_and_peak_wherever_it_strikes(
    train: Train, fault: Fault, phase: str, rank: str, zero_stage: int, micro_batch_size: int
) -> None:
    fault(f"rank={rank} phase={phase} kind=memory")
    config = TrialConfig(zero_stage=zero_stage, micro_batch_size=micro_batch_size, gradient_accumulation_steps=1)
    # A peer that has memory waits inside a collective for ever, and is killed long before this deadline.
    failure = failed(train(config, trial_seconds=3600))
    assert failure.kind == FailureKind.OUT_OF_MEMORY, failure
    assert failure.phase == phase, failure
    assert rank in (str(failure.rank), "*")
    assert failure.message.startswith(f"rank {failure.rank} in {phase}: ")
    assert failure.peak_memory_bytes is not None and failure.peak_memory_bytes > 100 * MIB


def test_running_out_of_memory_for_a_batch_is_told_as_that_with_phase_and_peak(
    train: Train, fault: Fault, workload: HuggingFaceWorkload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A batch of 64 MiB, made of rows that take as much, for a model of less than one.
    fields = {"model_type": "gpt2", "vocab_size": 32, "n_positions": 16384, "n_embd": 8, "n_layer": 1, "n_head": 1}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    fault("rank=0 phase=data kind=memory")
    monkeypatch.setenv("FAULT_MIB", "32")
    config = TrialConfig(zero_stage=1, micro_batch_size=512, gradient_accumulation_steps=1)
    long = dataclasses.replace(workload, model=str(tmp_path), seq_len=16384)
    failure = failed(train(config, workload=long))
    assert failure.kind == FailureKind.OUT_OF_MEMORY, failure
    assert (failure.phase, failure.rank) == ("data", 0), failure
    assert failure.peak_memory_bytes is not None and failure.peak_memory_bytes > 100 * MIB


def test_a_batch_that_is_too_large_for_the_memory_cap_runs_out_of_memory(train: Train, machine: Machine) -> None:
    capped = dataclasses.replace(machine, memory_cap_bytes=1024 * MIB)
    config = TrialConfig(zero_stage=1, micro_batch_size=1024, gradient_accumulation_steps=1)
    failure = failed(train(config, machine=capped))
    assert failure.kind == FailureKind.OUT_OF_MEMORY
    assert failure.phase in ("forward", "backward"), failure
    assert failure.peak_memory_bytes is not None and failure.peak_memory_bytes <= 1024 * MIB


def test_memory_that_runs_out_in_a_library_that_aborts_is_out_of_memory_too(train: Train, fault: Fault) -> None:
    fault("rank=1 phase=backward kind=bad_alloc")
    failure = failed(train())
    assert (failure.kind, failure.rank) == (FailureKind.OUT_OF_MEMORY, 1)
    assert failure.message == "rank 1 was killed by SIGABRT when an allocation failed in warm-up"


@pytest.mark.parametrize(
    ("fault_text", "message"),
    [
        ("rank=1 phase=forward kind=raise", "rank 1 in forward: RuntimeError: boom"),
        ("rank=0 phase=engine kind=exit", "rank 0 exited with status 3 in engine"),
        ("rank=1 phase=backward kind=sigsegv", "rank 1 was killed by SIGSEGV in warm-up"),
    ],
    ids=["exception", "exit status", "signal"],
)
def test_a_rank_that_crashes_is_a_crash_that_says_how_with_the_end_of_the_log(
    train: Train, fault: Fault, fault_text: str, message: str
) -> None:
    fault(fault_text)
    failure = failed(train())
    assert failure.kind == FailureKind.CRASH
    assert failure.message == message
    assert "raise" not in fault_text or "RuntimeError: boom" in failure.log_tail


def test_a_rank_that_hangs_is_killed_at_the_deadline_and_the_others_with_it(train: Train, fault: Fault) -> None:
    fault("rank=1 phase=model kind=stubborn")
    failure = failed(train(trial_seconds=10))
    assert failure.kind == FailureKind.TIMEOUT
    assert "deaf from here on" in failure.log_tail
    assert failure.message == "not finished after 10 s (rank 0 in engine, rank 1 in model); killed"


@pytest.mark.parametrize(
    ("base", "word"),
    [
        ({"zero_optimization": {"reduce_bukcet_size": 1}}, "reduce_bukcet_size"),
        ({"optimizer": {"type": "Adamm", "params": {}}}, "Adamm"),
    ],
    ids=["unknown key", "unknown optimizer"],
)
def test_a_deepspeed_setting_that_cannot_be_is_an_invalid_configuration_that_names_it(
    train: Train, workload: HuggingFaceWorkload, base: dict[str, Any], word: str
) -> None:
    failure = failed(train(workload=dataclasses.replace(workload, base_ds_config=base)))
    assert failure.kind == FailureKind.INVALID_CONFIG, failure
    assert word in failure.message


def test_memory_that_runs_out_while_a_rank_starts_is_told_as_that(train: Train, fault: Fault) -> None:
    fault("rank=1 phase=import kind=memory")
    failure = failed(train())
    assert (failure.kind, failure.phase) == (FailureKind.OUT_OF_MEMORY, "start"), failure


def test_a_machine_that_torch_cannot_use_is_told_before_any_trial(
    objective: Callable[..., DeepSpeedObjective], machine: Machine, started_ranks: Callable[[], list[Any]]
) -> None:
    gpus = dataclasses.replace(machine, device="cuda", name="NVIDIA H200", device_ids=(0, 1))
    with pytest.raises(EnvironmentFault, match=r"so it cannot use 2 × NVIDIA H200: install a torch that fits"):
        objective(machine=gpus).prepare()
    assert started_ranks() == []


def test_dataset_too_short_for_one_block_is_a_usage_error_before_any_trial(
    objective: Callable[..., DeepSpeedObjective], workload: HuggingFaceWorkload, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(UsageError, match=r"holds 9 tokens, too few for one block of `seq_len=32`$"):
        objective(workload=dataclasses.replace(workload, dataset=str(short))).prepare()
