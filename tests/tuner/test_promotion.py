"""Whoever beats the winner as one of its ablations is verified, until nobody does."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import optuna
import pytest
import rich.console

from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.numerics import STEPS, LossCurve
from ds_tune.objectives.running.rank_group import OnPhase
from ds_tune.objectives.trial import Measurement, Outcome, Provenance, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.storage.identity import Identity
from ds_tune.storage.layout import ResultsFolder
from ds_tune.storage.records import AfterSearch, Source, TrialRecord
from ds_tune.storage.study_store import StudyStore
from ds_tune.tuner.console import Console
from ds_tune.tuner.finals import Finals, Verification
from ds_tune.tuner.limits import Limits
from ds_tune.tuner.space import study_space
from ds_tune.tuner.stopping import StopSignals

MACHINE = Machine(device="cpu", name="a scripted machine", ranks=2, memory_bytes=8 * GIB)
WORKLOAD = HuggingFaceWorkload(model="gpt2-nano", seq_len=32, dtype="fp32")
LIMITS = Limits(ranks=2, max_micro_batch=8, max_global_batch=64)


def config(stage: int, mbs: int, gas: int) -> TrialConfig:
    return TrialConfig(zero_stage=stage, micro_batch_size=mbs, gradient_accumulation_steps=gas)


def measured(rate: float) -> Measurement:
    return Measurement(
        step_seconds=(1.0, 1.0, 1.0), samples_per_second=rate, samples_per_second_ci95=(0.999 * rate, 1.001 * rate),
        forward_seconds=0.3, backward_seconds=0.6, optimizer_seconds=0.1, deepspeed_samples_per_second=None,
        warmup_step_seconds=(1.0,), skipped_steps=0, peak_memory_bytes=GIB, reserved_memory_bytes=GIB, alloc_retries=0,
        setup_seconds=1.0, wall_seconds=5.0, model_parameters=1, flops_per_sample=1.0,
    )  # fmt: skip


class TableObjective:
    """Answers from a table; see `objectives.objective.TrainingObjective`."""

    provenance = Provenance.MEASURED

    def __init__(self, rates: Mapping[str, float]) -> None:
        self.rates = rates
        self.ran: list[str] = []

    def prepare(self, configs: Iterable[TrialConfig] = ()) -> None:
        pass

    def run(
        self, config: TrialConfig, folder: Path, on_phase: OnPhase, *, best_samples_per_second: float | None = None
    ) -> Outcome:
        self.ran.append(config.name)
        return measured(self.rates.get(config.name, 20.0))

    def losses(self, config: TrialConfig, folder: Path, on_phase: OnPhase) -> LossCurve:
        return LossCurve(losses=(8.0,) * STEPS, skipped_steps=0)

    def close(self) -> None:
        pass


BASELINE, FIRST, SECOND, THIRD, FOURTH = (
    config(0, 1, 1), config(2, 8, 1), config(3, 8, 1), config(2, 4, 2), config(0, 4, 2),
)  # fmt: skip
SEARCHED = {BASELINE: 10.0, FIRST: 104.0, SECOND: 103.0, FOURTH: 95.0}


@pytest.fixture
def searched(tmp_path: Path) -> Callable[[Mapping[TrialConfig, float]], StudyStore]:
    """A study of these trials, whose search is over."""

    def make(trials: Mapping[TrialConfig, float]) -> StudyStore:
        space = study_space(LIMITS, preset="core", allowed=frozenset(), workload=WORKLOAD, machine=MACHINE)
        identity = Identity(objective="scripted", workload=WORKLOAD, machine=MACHINE, space=space.to_json())
        url = f"sqlite:///{tmp_path}/study.db"
        store = StudyStore.create_or_resume(url, "study", identity, {}, optuna.samplers.RandomSampler(0))
        store.set_target(len(SEARCHED))
        for each, rate in trials.items():
            source = Source.BASELINE if each == BASELINE else Source.ABLATION if each == THIRD else Source.SEARCH
            store.enqueue(space.params(each), source)
            trial = store.study.ask(space.distributions)
            record = TrialRecord(
                number=trial.number, config=each, outcome=measured(rate), source=source,
                started_at="2026-11-30T00:00:00+00:00", machine=MACHINE, versions={},
            )  # fmt: skip
            store.save(trial, record)
            store.tell(trial, record)
        return store

    return make


def finish(store: StudyStore, folder: Path, fresh: Mapping[str, float], warm: Mapping[str, float]) -> TableObjective:
    """What comes after the search; returns who ran its ablations."""
    space = study_space(LIMITS, preset="core", allowed=frozenset(), workload=WORKLOAD, machine=MACHINE)
    training = TableObjective(warm)
    verification = Verification(fresh=TableObjective(fresh), training=training)
    console = Console(rich.console.Console(), quiet=True)
    Finals(store, ResultsFolder(folder), verification, console, StopSignals(lambda: None), space).run()
    return training


def test_ablation_that_beats_the_winner_is_verified_and_explained_in_its_place(
    searched: Callable[..., StudyStore], tmp_path: Path
) -> None:
    store = searched(SEARCHED)
    better = config(0, 8, 1)
    fresh = {FIRST.name: 103.0, SECOND.name: 101.0, better.name: 106.0, BASELINE.name: 10.0}
    finish(store, tmp_path, fresh, {FIRST.name: 103.0, better.name: 107.0})
    study = store.summary()
    assert study.winner == better.name
    assert study.after_search is AfterSearch.DONE
    assert study.contributions is not None
    for each in study.contributions.ablations:
        assert each.samples_per_second is not None and each.samples_per_second < each.winner_samples_per_second
        assert each.noise is not None and 0 < each.noise < 0.05, "stored, for the lines that say it"


def test_trial_of_the_search_that_beats_the_winner_as_its_ablation_is_verified_too(
    searched: Callable[..., StudyStore], tmp_path: Path
) -> None:
    # The third came from an ablation and won; beside it a trial of the search that never ran again was faster.
    store = searched({**SEARCHED, THIRD: 92.0})
    fresh = {FIRST.name: 100.0, SECOND.name: 99.0, THIRD.name: 101.0, FOURTH.name: 104.0, BASELINE.name: 10.0}
    finish(store, tmp_path, fresh, {})
    study = store.summary()
    assert list(study.promoted) == [FOURTH.name]
    assert study.winner == FOURTH.name
    assert study.verification[FOURTH.name]
    assert study.after_search is AfterSearch.DONE


def test_promoted_trial_that_is_slower_when_verified_is_not_promoted_again(
    searched: Callable[..., StudyStore], tmp_path: Path
) -> None:
    store = searched({**SEARCHED, THIRD: 92.0})
    fresh = {FIRST.name: 100.0, SECOND.name: 99.0, THIRD.name: 101.0, FOURTH.name: 95.0, BASELINE.name: 10.0}
    finish(store, tmp_path, fresh, {})
    study = store.summary()
    assert (study.winner, list(study.promoted)) == (THIRD.name, [FOURTH.name])
    assert study.contributions is not None
    [stage] = [each for each in study.contributions.ablations if each.field == "zero_stage"]
    assert (stage.samples_per_second, stage.winner_samples_per_second) == pytest.approx((95.0, 101.0)), "both verified"


def test_nothing_runs_and_nothing_is_counted_where_all_is_done(
    searched: Callable[..., StudyStore], tmp_path: Path
) -> None:
    store = searched(SEARCHED)
    finish(store, tmp_path, {}, {})
    before = store.summary()
    assert before.after_search is AfterSearch.DONE
    assert finish(store, tmp_path, {}, {}).ran == []
    assert store.summary().finals_seconds == before.finals_seconds


def test_winner_that_trains_something_else_is_forgotten(searched: Callable[..., StudyStore], tmp_path: Path) -> None:
    class Wrong(TableObjective):
        def losses(self, config: TrialConfig, folder: Path, on_phase: OnPhase) -> LossCurve:
            right = super().losses(config, folder, on_phase)
            return dataclasses.replace(right, losses=(9.0,) * STEPS) if config.zero_stage == 2 else right

    store = searched(SEARCHED)
    space = study_space(LIMITS, preset="core", allowed=frozenset(), workload=WORKLOAD, machine=MACHINE)
    fresh = TableObjective({FIRST.name: 103.0, SECOND.name: 102.0})
    verification = Verification(fresh=fresh, training=Wrong({}))
    console = Console(rich.console.Console(), quiet=True)
    Finals(store, ResultsFolder(tmp_path), verification, console, StopSignals(lambda: None), space).run()
    study = store.summary()
    assert study.winner == SECOND.name
    assert study.numerics_fault(study.records[1]) is not None
