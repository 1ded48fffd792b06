"""ds-tune's own sampler in a real study: it goes on where it was, beside what others queued, and knows what is done.

The trials are answered from a recorded H200 and stored as a study stores them.
"""

import dataclasses
import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy.engine
import sqlalchemy.event

from ds_tune.objectives.cost_model.hardware import hardware_of
from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.machine import GIB
from ds_tune.objectives.recorded.recording import Recording, read_recording
from ds_tune.objectives.trial import Failure, FailureKind, Measurement, Outcome, Provenance, TrialConfig
from ds_tune.storage.attributes import RECORD
from ds_tune.storage.records import Source, TrialRecord
from ds_tune.storage.study_store import Identity, StudyStore
from ds_tune.tuner.limits import Limits
from ds_tune.tuner.proposer import ENOUGH_GAIN
from ds_tune.tuner.sampler import OWN, CostModelSampler, make_sampler, unvisited
from ds_tune.tuner.space import Space

RECORDED = Path(__file__).parents[2] / "benchmarks" / "data" / "1xH200.gpt2-xl.jsonl"
SURFACE: Recording = read_recording(RECORDED)
VERSIONS = {"ds-tune": "0.1.0"}
CRASH = Failure(kind=FailureKind.CRASH, message="rank 0 was killed by SIGSEGV", phase="forward", log_tail="")


def named(name: str) -> TrialConfig:
    return next(config for config in SURFACE.outcomes if config.name == name)


def space_of(configs: Sequence[TrialConfig] = tuple(SURFACE.outcomes)) -> Space:
    limits = Limits(
        ranks=1,
        max_micro_batch=max(config.micro_batch_size for config in configs),
        max_global_batch=max(config.global_batch_size(1) for config in configs),
    )
    return Space(limits, restricted_to=tuple(configs))


SPACE = space_of()
FEW = space_of([named(f"z{stage}_gas1_tmbspg{mbs}") for stage in (0, 2) for mbs in (1, 4, 8)])


def sampler_of(space: Space = SPACE, seed: int = 0, capacity_gib: float | None = None) -> CostModelSampler:
    hardware = hardware_of(SURFACE.machine)
    if capacity_gib is not None:
        hardware = dataclasses.replace(hardware, capacity_bytes=int(capacity_gib * GIB))
    sampler = make_sampler(OWN, space, seed, CostModel(SURFACE.workload, hardware))
    assert isinstance(sampler, CostModelSampler)
    return sampler


def leave_writing_to_the_kernel(connection: Any, record: Any) -> None:
    """Waiting for the disk would be most of a test's time."""
    connection.execute("PRAGMA synchronous=OFF")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of one database for all studies here: to make its tables takes longer than a search."""
    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "connect", leave_writing_to_the_kernel)
    yield f"sqlite:///{tmp_path_factory.mktemp('studies')}/studies.db"
    sqlalchemy.event.remove(sqlalchemy.engine.Engine, "connect", leave_writing_to_the_kernel)


@pytest.fixture
def open_study(database: str) -> Callable[..., StudyStore]:
    """Opens the study of that name, or begins it, as a tuner does each time it is started."""
    test = uuid.uuid4().hex

    def open_(sampler: CostModelSampler, space: Space = SPACE, name: str = "study") -> StudyStore:
        identity = Identity(
            objective="samples_per_second, end to end",
            workload=SURFACE.workload,
            machine=SURFACE.machine,
            space=space.to_json(),
            provenance=Provenance.REPLAYED,
        )
        return StudyStore.create_or_resume(database, f"{test}-{name}", identity, VERSIONS, sampler)

    return open_


def record_of(config: TrialConfig, outcome: Outcome, number: int = 0) -> TrialRecord:
    return TrialRecord(
        number=number,
        config=config,
        outcome=outcome,
        source=Source.SEARCH,
        started_at="2026-11-23T04:42:00+00:00",
        machine=SURFACE.machine,
        versions=VERSIONS,
    )


def run_trial(store: StudyStore, space: Space = SPACE, outcome: Outcome | None = None) -> TrialConfig:
    """Asks, answers from the recording unless told, saves and tells."""
    trial = store.ask(space.distributions)
    config = TrialConfig(**trial.params)
    record = record_of(config, outcome or SURFACE.outcomes[config], trial.number)
    store.save(trial, record)
    store.tell(trial, record)
    return config


def search(store: StudyStore, trials: int, space: Space = SPACE) -> list[str]:
    return [run_trial(store, space).name for _ in range(trials)]


def trials_of(store: StudyStore) -> list[optuna.trial.FrozenTrial]:
    return store.trials()


Open = Callable[..., StudyStore]


def test_a_search_learns_and_soon_finds_the_best(open_study: Open) -> None:
    store = open_study(sampler_of())
    names = search(store, 9)
    assert len(set(names)) == 9
    rates = [outcome.samples_per_second for outcome in SURFACE.outcomes.values() if isinstance(outcome, Measurement)]
    fastest = store.summary().fastest
    assert fastest is not None and fastest.samples_per_second is not None
    assert fastest.samples_per_second > 0.97 * max(rates)


@pytest.mark.parametrize("stop_after", [1, 3, 6])
def test_a_resumed_study_goes_on_as_an_uninterrupted_one_would(open_study: Open, stop_after: int) -> None:
    whole = search(open_study(sampler_of(seed=3), name="whole"), 8)
    parts = search(open_study(sampler_of(seed=3), name="parts"), stop_after)
    parts += search(open_study(sampler_of(seed=3), name="parts"), 8 - stop_after)
    assert parts == whole


def test_one_sampler_serves_several_studies_without_mixing_them(open_study: Open) -> None:
    sampler = sampler_of(seed=1)
    alone = search(open_study(sampler, name="alone"), 4)
    first, second = open_study(sampler, name="first"), open_study(sampler, name="second")
    names = [(run_trial(first).name, run_trial(second).name) for _ in range(4)]
    assert [one for one, _ in names] == [other for _, other in names] == alone


def test_queued_configurations_run_unchanged_and_become_observations(open_study: Open) -> None:
    store = open_study(sampler_of())
    queued = ["z3_ac1_gas1_tmbspg64", "z2_gas1_tmbspg12"]
    for name in queued:
        store.enqueue(SPACE.params(named(name)), Source.BASELINE)
    assert search(store, 2) == queued
    sampler = sampler_of()
    row = sampler.proposer.row(named("z2_gas1_tmbspg12"))
    assert row in [each.row for each in sampler.observations(trials_of(store))]
    assert not set(queued) & set(search(store, 6))


def test_cost_model_sampler_does_not_propose_a_queued_configuration(open_study: Open) -> None:
    sampler = sampler_of()
    store = open_study(sampler)
    search(store, 1)
    wanted = sampler.propose(trials_of(store), 1)
    assert wanted is not None
    store.enqueue(SPACE.params(wanted.config), Source.RETRY)
    other = sampler.propose(trials_of(store), 1)
    assert other is not None and other.config != wanted.config


def test_queued_configuration_runs_even_where_no_configuration_can_fit(open_study: Open) -> None:
    """The last of the untuned configurations is launched in any case: a trial has to say that nothing fits."""
    store = open_study(sampler_of(FEW, capacity_gib=4), FEW)
    store.enqueue(FEW.params(named("z2_gas1_tmbspg1")), Source.BASELINE)
    assert search(store, 1, FEW) == ["z2_gas1_tmbspg1"]


def test_a_trial_counts_once_it_is_told_and_not_before(open_study: Open) -> None:
    """A tuner may be killed between saving and telling; the next one tells what was saved."""
    sampler = sampler_of()
    store = open_study(sampler)
    trial = store.ask(SPACE.distributions)
    config = TrialConfig(**trial.params)
    store.save(trial, record_of(config, SURFACE.outcomes[config], trial.number))
    assert sampler.observations(trials_of(store)) == []
    store.recover(SPACE.config_of)
    assert [each.row for each in sampler.observations(trials_of(store))] == [sampler.proposer.row(config)]


def test_cost_model_sampler_does_not_propose_a_running_configuration(open_study: Open) -> None:
    store = open_study(sampler_of())
    running = [TrialConfig(**store.ask(SPACE.distributions).params).name for _ in range(5)]
    assert len(set(running)) == 5


def test_trials_of_others_without_a_record_teach_nothing_and_are_not_repeated(open_study: Open) -> None:
    """Whoever added them did not train on this machine, or did not say what came of it."""
    sampler = sampler_of()
    store = open_study(sampler)
    search(store, 2)
    before = sampler.forecast(named("z1_gas1_tmbspg20"), trials_of(store))
    wanted = sampler.propose(trials_of(store), 2)
    assert wanted is not None
    foreign = optuna.trial.create_trial(
        params=SPACE.params(wanted.config), distributions=SPACE.distributions, value=1000.0
    )
    store.study.add_trial(foreign)
    assert len(sampler.observations(trials_of(store))) == 2
    assert sampler.forecast(named("z1_gas1_tmbspg20"), trials_of(store)) == before
    assert wanted.config.name not in search(store, 4)


def test_records_of_configurations_outside_the_space_are_passed_over(open_study: Open) -> None:
    sampler = sampler_of(FEW)
    store = open_study(sampler, FEW)
    outside = named("z1_gas1_tmbspg16")
    trial = optuna.trial.create_trial(
        params=FEW.params(outside),
        # As a study on a wider space would have it.
        distributions={name: SPACE.distributions[name] for name in FEW.distributions},
        value=27.0,
        system_attrs={RECORD: json.dumps(record_of(outside, SURFACE.outcomes[outside]).to_json())},
    )
    assert sampler.observations([trial]) == []
    assert sampler.propose([trial], 1) == sampler.propose([], 1)
    assert sampler.forecast(outside, trials_of(store)) is None


def test_a_crash_teaches_nothing_and_its_configuration_is_left_alone(open_study: Open) -> None:
    sampler = sampler_of()
    store = open_study(sampler)
    search(store, 2)
    before = sampler.forecast(named("z1_gas1_tmbspg20"), trials_of(store))
    crashed = run_trial(store, outcome=CRASH)
    assert sampler.forecast(named("z1_gas1_tmbspg20"), trials_of(store)) == before
    assert crashed.name not in search(store, 4)


def test_running_out_of_memory_is_learned_from_the_stored_trial(open_study: Open) -> None:
    sampler = sampler_of()
    store = open_study(sampler)
    store.enqueue(SPACE.params(named("z1_gas1_tmbspg24")), Source.BASELINE)
    before = sampler.forecast(named("z2_gas1_tmbspg24"), [])
    search(store, 1)
    after = sampler.forecast(named("z2_gas1_tmbspg24"), trials_of(store))
    assert before is not None and after is not None
    assert after.probability_of_fitting < before.probability_of_fitting
    assert after.peak_memory_bytes > before.peak_memory_bytes


def test_a_small_space_is_tried_to_its_end_and_then_there_is_nothing(open_study: Open) -> None:
    sampler = sampler_of(FEW)
    store = open_study(sampler, FEW)
    names = search(store, len(FEW.legal), FEW)
    assert sorted(names) == sorted(config.name for config in FEW.legal)
    assert unvisited(FEW, trials_of(store)) == []
    assert sampler.propose(trials_of(store), len(names)) is None
    assert sampler.excluded(trials_of(store)) == []


def test_there_is_nothing_either_where_all_that_is_left_cannot_fit() -> None:
    hopeless = sampler_of(FEW, capacity_gib=4)
    assert hopeless.propose([], 0) is None
    assert sum(each.configurations for each in hopeless.excluded([])) == len(FEW.legal)


def test_asking_changes_nothing(open_study: Open) -> None:
    """A study asks what would come next to see whether to go on, and then has it run."""
    sampler = sampler_of()
    store = open_study(sampler)
    for number in range(5):
        expected = [sampler.propose(trials_of(store), number) for _ in range(2)]
        assert expected[0] == expected[1] is not None
        assert run_trial(store) == expected[0].config


def test_the_expected_gain_falls_below_what_is_worth_a_trial(open_study: Open) -> None:
    sampler = sampler_of()
    store = open_study(sampler)
    gains = []
    for number in range(15):
        proposal = sampler.propose(trials_of(store), number)
        assert proposal is not None
        gains.append(proposal.expected_gain)
        run_trial(store)
    assert gains[1] > ENOUGH_GAIN > min(gains)


def test_proposals_are_parameters_that_optuna_can_hold(open_study: Open) -> None:
    store = open_study(sampler_of())
    search(store, 4)
    for trial in trials_of(store):
        assert trial.params == SPACE.params(TrialConfig(**trial.params))
        assert trial.distributions == SPACE.distributions
