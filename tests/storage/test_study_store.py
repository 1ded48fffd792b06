"""What Optuna and its dashboard get to see of a study, and what is found again when it is opened."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution, distribution_to_json

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.machine import GIB
from ds_tune.objectives.trial import FailureKind, Measurement, Provenance, TrialConfig
from ds_tune.storage.attributes import set_study_attribute
from ds_tune.storage.identity import differences
from ds_tune.storage.records import Source, TrialRecord
from ds_tune.storage.study_store import IDENTITY, Identity, StudyStore
from ds_tune.tuner.reports.notes import publish
from ds_tune.tuner.reports.report import Report

MakeRecord = Callable[..., TrialRecord]
SPACE: dict[str, optuna.distributions.BaseDistribution] = {
    "zero_stage": CategoricalDistribution((0, 1, 2, 3)),
    "micro_batch_size": IntDistribution(1, 64),
    "gradient_accumulation_steps": IntDistribution(1, 64),
}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/study.db"


@pytest.fixture
def open_store(url: str, identity: Identity) -> Callable[..., StudyStore]:
    def open_it(identity: Identity = identity) -> StudyStore:
        return StudyStore.create_or_resume(url, "study", identity, {"torch": "2"}, optuna.samplers.RandomSampler(0))

    return open_it


@pytest.fixture
def store(open_store: Callable[..., StudyStore]) -> StudyStore:
    return open_store()


def ask(store: StudyStore, record: TrialRecord) -> optuna.Trial:
    store.enqueue(record.config.to_json(), record.source)
    return store.ask(SPACE)


def run(store: StudyStore, record: TrialRecord) -> optuna.trial.FrozenTrial:
    """Has the study run one trial that ends with this record."""
    trial = ask(store, record)
    record = dataclasses.replace(record, number=trial.number)
    store.save(trial, record)
    store.tell(trial, record)
    return store.study.trials[trial.number]


def measurement_of(record: TrialRecord) -> Measurement:
    assert isinstance(record.outcome, Measurement)
    return record.outcome


def config_of(trial: optuna.trial.FrozenTrial) -> TrialConfig | None:
    return TrialConfig(**trial.params) if set(trial.params) == set(SPACE) else None


def test_a_measurement_is_complete_with_its_throughput(store: StudyStore, make_record: MakeRecord) -> None:
    trial = run(store, make_record("z1_gas2_tmbspg4", 40.0))
    assert trial.state is optuna.trial.TrialState.COMPLETE
    assert trial.value == pytest.approx(40.0)
    assert store.study.best_trial.number == trial.number


def test_out_of_memory_is_pruned(store: StudyStore, make_record: MakeRecord) -> None:
    assert run(store, make_record("z1_gas1_tmbspg64")).state is optuna.trial.TrialState.PRUNED


@pytest.mark.parametrize("kind", [FailureKind.CRASH, FailureKind.TIMEOUT, FailureKind.INVALID_CONFIG])
def test_crash_timeout_and_invalid_config_are_failed_trials_without_constraints(
    store: StudyStore, make_record: MakeRecord, kind: FailureKind
) -> None:
    trial = run(store, make_record("z1_gas1_tmbspg1", kind=kind))
    assert trial.state is optuna.trial.TrialState.FAIL
    assert trial.constraints == {}
    assert trial.user_attrs["reason"].startswith(kind.value.replace("_", " "))


def test_each_timed_step_is_an_intermediate_value_in_samples_per_second(
    store: StudyStore, make_record: MakeRecord
) -> None:
    record = make_record("z1_gas2_tmbspg4", 40.0)
    trial = run(store, record)
    seconds = record.outcome.to_json()["step_seconds"]
    assert trial.intermediate_values == {step: pytest.approx(16 / value) for step, value in enumerate(seconds, 1)}


@pytest.mark.parametrize(("peak_gib", "violation"), [(12.0, -0.5), (24.0, 0.0), (26.0, 0.0)])
def test_memory_constraint_of_a_trial_that_ran_is_minus_its_free_share(
    store: StudyStore, make_record: MakeRecord, peak_gib: float, violation: float
) -> None:
    trial = run(store, make_record("z1_gas2_tmbspg4", 40.0, peak_gib=peak_gib))
    assert trial.constraints["memory"] == pytest.approx(violation)
    # optuna-dashboard 0.21 reads this one.
    assert trial.system_attrs["constraints"] == [pytest.approx(violation)]
    assert store.study.best_trial.number == trial.number


def test_out_of_memory_violates_the_constraint(store: StudyStore, make_record: MakeRecord) -> None:
    trial = run(store, make_record("z1_gas1_tmbspg64"))
    assert trial.constraints["memory"] > 0
    assert trial.system_attrs["constraints"][0] > 0


def test_the_objective_has_a_name_and_a_direction(store: StudyStore) -> None:
    assert store.study.metric_names == ["samples_per_second"]
    assert store.study.direction is optuna.study.StudyDirection.MAXIMIZE


def test_the_dashboards_columns_have_units_in_their_names(store: StudyStore, make_record: MakeRecord) -> None:
    measured = run(store, make_record("z1_gas2_tmbspg4", 40.0)).user_attrs
    assert measured["name"] == "z1_gas2_tmbspg4"
    assert measured["peak_memory_gib"] == 12.0
    assert measured["step_seconds"] == pytest.approx(16 / 40)
    assert measured["wall_seconds"] == 20.0
    assert measured["samples_per_second"] == pytest.approx(40.0)
    assert measured["samples_per_second_ci95_low"] < 40 < measured["samples_per_second_ci95_high"]
    failed = run(store, make_record("z1_gas1_tmbspg64")).user_attrs
    assert failed["reason"] == "out of memory in forward (peak 12.00 of 24.00 GiB)"


def test_user_attributes_are_short_and_plain(store: StudyStore, make_record: MakeRecord) -> None:
    """They are columns of optuna-dashboard's tables and of `optuna trials` and `optuna studies`."""
    trials = [run(store, make_record("z1_gas2_tmbspg4", 40.0)), run(store, make_record("z1_gas1_tmbspg64"))]
    store.add_verification("z1_gas2_tmbspg4", measurement_of(make_record("z1_gas2_tmbspg4", 41.0)))
    store.set_winner("z1_gas2_tmbspg4", [], [])
    publish(store.study, Report.of(store.summary()))
    for attributes in (store.study.user_attrs, *(trial.user_attrs for trial in trials)):
        assert attributes
        assert all(isinstance(value, int | float | str) and len(str(value)) <= 100 for value in attributes.values())
    assert store.study.user_attrs["best"] == "z1_gas2_tmbspg4 (trial 0)"
    assert "gpt2-xl" in store.study.user_attrs["model"] and "NVIDIA H200" in store.study.user_attrs["hardware"]


def test_the_record_is_kept_whole(store: StudyStore, make_record: MakeRecord) -> None:
    record = make_record("z1_gas2_tmbspg4", 40.0, source=Source.BASELINE)
    run(store, record)
    assert store.records() == [record]


@pytest.mark.parametrize("last", ["set_constraint", "report", "set_user_attr"])
def test_trial_told_in_part_before_an_interrupt_is_told_completely_on_recovery(
    store: StudyStore, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """`last` is what was stored before the tuner ended; it is not stored twice."""
    record = make_record("z1_gas2_tmbspg4", 40.0)
    trial = ask(store, record)
    store.save(trial, record)
    stored = getattr(optuna.Trial, last)

    def store_and_end(*arguments: Any) -> None:
        stored(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Trial, last, store_and_end)
        with pytest.raises(KeyboardInterrupt):
            store.tell(trial, record)
    store.recover(config_of)
    [told] = store.study.trials
    assert told.value == pytest.approx(40.0)
    assert len(told.intermediate_values) == 5
    assert told.constraints["memory"] == pytest.approx(-0.5)
    assert told.system_attrs["constraints"] == [pytest.approx(-0.5)]


@pytest.mark.parametrize("samples_per_second", [40.0, None], ids=["measurement", "out_of_memory"])
def test_a_saved_trial_is_told_when_the_study_is_opened_again(
    open_store: Callable[..., StudyStore], make_record: MakeRecord, samples_per_second: float | None
) -> None:
    store = open_store()
    record = make_record("z1_gas2_tmbspg4", samples_per_second)
    store.save(ask(store, record), record)
    again = open_store()
    assert again.records() == []
    assert again.recover(config_of) == []
    assert again.records() == [record]
    [trial] = again.study.trials
    assert trial.state is (optuna.trial.TrialState.COMPLETE if samples_per_second else optuna.trial.TrialState.PRUNED)


def test_an_interrupted_trial_fails_and_its_configuration_is_queued_once(
    store: StudyStore, make_record: MakeRecord
) -> None:
    record = make_record("z1_gas2_tmbspg4", 40.0)
    ask(store, record)
    assert store.recover(config_of) == ["z1_gas2_tmbspg4"]
    assert store.recover(config_of) == []
    interrupted, waiting = store.study.trials
    assert interrupted.state is optuna.trial.TrialState.FAIL
    assert interrupted.user_attrs["reason"] == "interrupted"
    assert waiting.state is optuna.trial.TrialState.WAITING
    assert waiting.system_attrs["fixed_params"] == record.config.to_json()
    assert waiting.user_attrs["source"] == "retry"
    assert "constraints" not in waiting.system_attrs


def test_an_interrupted_baseline_stays_the_baseline(store: StudyStore, make_record: MakeRecord) -> None:
    ask(store, make_record("z0_gas1_tmbspg1", 40.0, source=Source.BASELINE))
    store.recover(config_of)
    assert store.study.trials[1].user_attrs["source"] == "baseline"


def test_asking_for_a_configuration_twice_queues_it_once(store: StudyStore, make_record: MakeRecord) -> None:
    for _ in range(2):
        store.enqueue(make_record("z0_gas1_tmbspg1").config.to_json(), Source.BASELINE)
    assert len(store.study.trials) == 1
    assert store.has_waiting()


CHANGES: dict[str, tuple[Callable[[Identity], Identity], str]] = {
    "objective": (lambda one: dataclasses.replace(one, objective="latency"), "objective samples_per_second there, lat"),
    "space": (lambda one: dataclasses.replace(one, space={"global_batch": 16}), "space global_batch none there, 16 h"),
    "model": (
        lambda one: dataclasses.replace(one, workload=dataclasses.replace(one.workload, model="gpt2")),
        "workload model gpt2-xl there, gpt2 here",
    ),
    "base configuration": (
        lambda one: dataclasses.replace(
            one, workload=dataclasses.replace(one.workload, base_ds_config={"gradient_clipping": 0.5})
        ),
        "workload base_ds_config gradient_clipping none there, 0.5 here",
    ),
    "hardware": (
        lambda one: dataclasses.replace(one, machine=dataclasses.replace(one.machine, name="NVIDIA A100")),
        "hardware name NVIDIA H200 there, NVIDIA A100 here",
    ),
    "memory cap": (
        lambda one: dataclasses.replace(one, machine=dataclasses.replace(one.machine, memory_cap_bytes=8 * GIB)),
        "hardware memory_cap_bytes 25769803776 there, 8589934592 here",
    ),
}


def test_other_values_to_search_are_named_in_words() -> None:
    sizes, words = ("micro_batch_size", "compile")
    there = {sizes: distribution_to_json(IntDistribution(1, 16, log=True))}
    here = {
        sizes: distribution_to_json(IntDistribution(1, 24, log=True)),
        words: distribution_to_json(CategoricalDistribution(["off", "blocks"])),
    }
    assert differences({"space": {"dimensions": there}}, {"space": {"dimensions": here}}) == [
        "space dimensions micro_batch_size 1 to 16 there, 1 to 24 here",
        "space dimensions compile none there, off or blocks here",
    ]


@pytest.mark.parametrize("change", CHANGES)
def test_measurements_of_something_else_are_not_mixed_in(
    open_store: Callable[..., StudyStore], make_record: MakeRecord, identity: Identity, change: str
) -> None:
    record = make_record("z1_gas2_tmbspg4", 40.0)
    run(open_store(), record)
    other, sentence = CHANGES[change]
    with pytest.raises(UsageError) as caught:
        open_store(other(identity))
    assert sentence in str(caught.value)
    assert "study study measured something else" in str(caught.value)
    assert open_store().records() == [record]


@pytest.mark.parametrize("change", CHANGES)
def test_a_study_that_learned_nothing_is_begun_anew(
    open_store: Callable[..., StudyStore], make_record: MakeRecord, identity: Identity, change: str
) -> None:
    run(open_store(), make_record("z1_gas2_tmbspg4", kind=FailureKind.INVALID_CONFIG))
    assert open_store(CHANGES[change][0](identity)).study.trials == []


def test_the_same_study_goes_on_with_other_versions_and_keeps_those_of_each_trial(
    url: str, open_store: Callable[..., StudyStore], make_record: MakeRecord, identity: Identity
) -> None:
    run(open_store(), make_record("z1_gas2_tmbspg4", 40.0))
    sampler = optuna.samplers.RandomSampler()
    summary = StudyStore.create_or_resume(url, "study", identity, {"torch": "3"}, sampler).summary()
    assert summary.versions == {"torch": "3"}
    assert summary.records[0].versions["torch"] == "2.13.0"


def test_a_study_that_another_program_made_is_left_alone(url: str, open_store: Callable[..., StudyStore]) -> None:
    optuna.create_study(study_name="study", storage=url).add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(UsageError, match=r"holds a study study that ds-tune did not make; use `study=NAME`"):
        open_store()
    with pytest.raises(UsageError, match=r"study study in .* was not made by ds-tune"):
        StudyStore.load(url, None)
    assert len(optuna.load_study(study_name="study", storage=url).trials) == 1


def test_a_study_whose_tuner_was_killed_while_making_it_is_made_now(
    url: str, open_store: Callable[..., StudyStore]
) -> None:
    optuna.create_study(study_name="study", storage=url, direction="maximize")
    assert open_store().summary().records == []


def test_the_only_study_needs_no_name(url: str, store: StudyStore) -> None:
    assert StudyStore.load(url, None).study.study_name == "study"


def test_an_unknown_study_is_answered_with_those_there(url: str, store: StudyStore) -> None:
    with pytest.raises(UsageError, match=r"no study other in .* \(it holds study\); name one with `study`"):
        StudyStore.load(url, "other")
    optuna.create_study(study_name="second", storage=url)
    with pytest.raises(UsageError, match=r"no single study in .* \(it holds study, second\)"):
        StudyStore.load(url, None)


def test_tuning_time_adds_up_over_sessions(open_store: Callable[..., StudyStore]) -> None:
    for seconds in (1.5, 2.5):
        open_store().add_seconds(seconds)
    assert open_store().summary().tuning_seconds == 4.0


def test_a_new_target_forgets_why_the_search_ended(store: StudyStore) -> None:
    store.set_target(3)
    store.set_ended("every configuration of the space has been tried")
    store.set_target(3)
    assert store.summary().ended is not None
    store.set_target(4)
    assert store.summary().ended is None


def test_the_identity_is_readable_in_the_database(store: StudyStore, identity: Identity) -> None:
    attributes: dict[str, Any] = store.attributes
    assert json.loads(json.dumps(attributes["ds_tune:identity"]))["workload"]["model"] == "gpt2-xl"


def test_a_study_from_before_there_were_other_figures_is_measured(
    open_store: Callable[..., StudyStore], make_record: MakeRecord
) -> None:
    store = open_store()
    run(store, make_record("z1_gas1_tmbspg1", 10.0))
    old = store.attributes[IDENTITY]
    del old["figures"], old["recording"], old["workload"]["type"]
    set_study_attribute(store.storage, store.study, IDENTITY, old)
    again = open_store()
    assert len(again.records()) == 1
    assert again.summary().provenance is Provenance.MEASURED


def test_figures_of_another_kind_are_refused(
    open_store: Callable[..., StudyStore], make_record: MakeRecord, identity: Identity
) -> None:
    run(open_store(), make_record("z1_gas1_tmbspg1", 10.0))
    with pytest.raises(UsageError, match=r"measured something else \(figures measured there, simulated here\)"):
        open_store(dataclasses.replace(identity, provenance=Provenance.SIMULATED))


def test_optuna_is_told_of_figures_that_were_not_measured(
    open_store: Callable[..., StudyStore], make_record: MakeRecord, identity: Identity
) -> None:
    store = open_store(dataclasses.replace(identity, provenance=Provenance.SIMULATED))
    for record in (make_record("z1_gas1_tmbspg1", 10.0), make_record("z1_gas1_tmbspg64")):
        assert run(store, record).user_attrs["figures"] == "simulated"
    assert store.study.metric_names == ["samples_per_second, simulated"]
    assert store.summary().provenance is Provenance.SIMULATED


def test_optuna_is_told_nothing_more_of_measured_ones(store: StudyStore, make_record: MakeRecord) -> None:
    assert "figures" not in run(store, make_record("z1_gas1_tmbspg1", 10.0)).user_attrs
    assert store.study.metric_names == ["samples_per_second"]
