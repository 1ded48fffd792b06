"""Ranks that stay alive: trial after trial in one pair of processes, with nothing left between them."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.running import rank_group
from ds_tune.objectives.running.deepspeed_objective import DeepSpeedObjective
from ds_tune.objectives.timing.step_plan import StepPlan
from ds_tune.objectives.trial import Failure, FailureKind, Measurement, Outcome, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

MIB = 2**20
ONE_STEP = StepPlan(warmup_steps=1, zero3_extra_warmup_steps=0, min_timed_steps=2, max_timed_steps=2)


def config(stage: int, micro_batch_size: int = 1, accumulation: int = 1) -> TrialConfig:
    return TrialConfig(zero_stage=stage, micro_batch_size=micro_batch_size, gradient_accumulation_steps=accumulation)


@pytest.fixture
def study(objective: Callable[..., DeepSpeedObjective], tmp_path: Path) -> Callable[..., list[Outcome]]:
    """Runs configurations one after the other in the same ranks, as long as they last."""

    def run(*configs: TrialConfig, **changes: Any) -> list[Outcome]:
        tuned = objective(plan=ONE_STEP, **changes)
        outcomes = []
        for each in configs:
            folder = tmp_path / each.name
            folder.mkdir(exist_ok=True)
            outcomes.append(tuned.run(each, folder, lambda phase: None))
        return outcomes

    return run


def test_thirty_mixed_trials_run_in_one_pair_of_ranks_whose_memory_stays_level(
    objective: Callable[..., DeepSpeedObjective],
    started_ranks: Callable[[], list[psutil.Process]],
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Both ranks run out of memory, on a busy machine seconds apart.
    monkeypatch.setattr(rank_group, "PEER_GRACE_SECONDS", 60.0)
    too_large = config(1, 2048)
    mixed = itertools.cycle([config(3, 2), config(0), config(2, 2, 2), config(3, 1, 2), config(1, 4), too_large])
    notices: list[str] = []
    tuned = objective(
        plan=ONE_STEP,
        machine=Machine(device="cpu", name=machine.name, ranks=2, memory_bytes=8 * GIB, memory_cap_bytes=GIB),
        notice=notices.append,
    )
    resident: dict[int, list[int]] = {}
    for each in itertools.islice(mixed, 30):
        folder = tmp_path / each.name
        folder.mkdir(exist_ok=True)
        outcome = tuned.run(each, folder, lambda phase: None)
        if each is too_large:
            assert isinstance(outcome, Failure) and outcome.kind is FailureKind.OUT_OF_MEMORY, outcome
        else:
            assert isinstance(outcome, Measurement), outcome
        for process in started_ranks():
            resident.setdefault(process.pid, []).append(process.memory_info().rss)
    assert notices == [], "the ranks were replaced"
    assert len(resident) == 2
    for values in resident.values():
        assert len(values) == 30
        assert max(values[6:]) - min(values[6:]) < 128 * MIB, [value // MIB for value in values]


def test_a_zero3_engine_leaves_nothing_of_itself(study: Callable[..., list[Outcome]], tmp_path: Path) -> None:
    """Each engine holds about 30 MiB of shards and states; DeepSpeed alone would keep every one of them."""
    outcomes = study(*[config(3)] * 8)
    peaks = [outcome.peak_memory_bytes for outcome in outcomes if isinstance(outcome, Measurement)]
    assert len(peaks) == 8
    assert peaks[-1] - peaks[1] < 64 * MIB


@pytest.mark.parametrize("kind", ["raising", "exit", "stubborn"])
def test_ranks_after_a_fault_are_new_ones_and_the_study_goes_on(
    study: Callable[..., list[Outcome]], fault: Callable[[str], Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"raising": "raise", "exit": "exit", "stubborn": "stubborn"}
    fault(f"rank=1 phase=backward kind={kinds[kind]}")
    notices: list[str] = []

    def heal(text: str) -> None:
        notices.append(text)
        monkeypatch.delenv("FAULT")

    first, second = study(config(1), config(2), notice=heal, trial_seconds=20)
    assert isinstance(first, Failure) and first.kind is not FailureKind.OUT_OF_MEMORY
    assert isinstance(second, Measurement)
    assert notices == ["New training processes after z1_gas1_tmbspg1: its processes were ended."]


def test_one_rank_out_of_memory_is_contained_and_the_study_goes_on(
    study: Callable[..., list[Outcome]], fault: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault("rank=1 phase=forward kind=memory")
    notices: list[str] = []

    def heal(text: str) -> None:
        notices.append(text)
        monkeypatch.delenv("FAULT")

    first, second = study(config(1, 16), config(1, 2), notice=heal)
    assert isinstance(first, Failure) and (first.kind, first.rank) == (FailureKind.OUT_OF_MEMORY, 1)
    assert isinstance(second, Measurement)
    assert len(notices) == 1


def test_fresh_ranks_are_new_for_every_trial(
    objective: Callable[..., DeepSpeedObjective],
    started_ranks: Callable[[], list[psutil.Process]],
    tmp_path: Path,
) -> None:
    tuned = objective(plan=ONE_STEP, fresh_ranks=True)
    tuned.prepare()
    first = {rank.pid for rank in started_ranks()}
    assert isinstance(tuned.run(config(1), tmp_path, lambda phase: None), Measurement)
    assert {rank.pid for rank in started_ranks()} == set()
    tuned.prepare()
    assert not {rank.pid for rank in started_ranks()} & first


def test_a_trial_that_is_clearly_slower_than_the_best_is_stopped(
    objective: Callable[..., DeepSpeedObjective], tmp_path: Path
) -> None:
    tuned = objective(plan=StepPlan(max_timed_steps=30, timed_seconds=60))
    outcome = tuned.run(config(1), tmp_path, lambda phase: None, best_samples_per_second=1e6)
    assert isinstance(outcome, Measurement)
    assert outcome.stopped_early
    assert len(outcome.step_seconds) < 30


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_optimizer_that_only_some_trials_need_is_compiled_before_the_first(compiled_adam: Any) -> None:
    """DeepSpeed's CPUAdam, really compiled: for no trial yet, and told in a line."""
    told = compiled_adam.told
    assert [line for line in told if "Compiling DeepSpeed's cpu_adam" in line] == told and len(told) == 1
    assert list(compiled_adam.extensions.glob("**/cpu_adam.so"))
    assert not list(compiled_adam.extensions.glob("**/fused_adam.so")), "no trial needs it"


def test_an_optimizer_that_cannot_be_compiled_does_not_keep_others_from_training(
    objective: Callable[..., DeepSpeedObjective],
    own_adam: HuggingFaceWorkload,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))  # where nothing is compiled yet
    monkeypatch.setenv("CXX", "/no/compiler")
    told: list[str] = []
    tuned = objective(workload=own_adam, notice=told.append, plan=ONE_STEP)
    trains = dataclasses.replace(config(1), optimizer="torch_fused")
    tuned.prepare([trains, dataclasses.replace(config(1), offload_optimizer="cpu")])
    assert any("cpu_adam cannot be compiled" in line and "Trials that need it will fail" in line for line in told)
    assert isinstance(tuned.run(trains, tmp_path, lambda phase: None), Measurement)
