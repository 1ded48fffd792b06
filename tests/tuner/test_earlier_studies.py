"""A study begins with what earlier ones in the same storage learned about the same training on the same machine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_tune.objectives.cost_model.hardware import hardware_of
from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.machine import GIB
from ds_tune.objectives.trial import Failure
from ds_tune.storage.earlier import earlier_records
from ds_tune.storage.study_store import IDENTITY, Identity, StudyStore
from ds_tune.tuner.limits import Limits
from ds_tune.tuner.sampler import CostModelSampler
from ds_tune.tuner.space import Space

Tune = Callable[..., Any]
OWN = ["--sampler", "cost-model"]
SMALL = ["--gpus", "0", "--max-micro-batch", "4", "--max-global-batch", "8"]


def url(folder: Path) -> str:
    return f"sqlite:///{folder}/shared.db"


def identity_of(store: StudyStore) -> Identity:
    stored = store.attributes[IDENTITY]
    summary = store.summary()
    return Identity(
        objective=stored["objective"], workload=summary.workload, machine=summary.machine, space=stored["space"]
    )


def forecasts(folder: Path, study: str) -> list[float]:
    """Relative errors of the predicted samples/s, trial by trial."""
    errors = []
    for record in StudyStore.load(url(folder), study).records():
        if record.forecast is not None and not isinstance(record.outcome, Failure):
            errors.append(abs(record.forecast.samples_per_second / record.outcome.samples_per_second - 1))
    return errors


def test_the_first_forecast_of_a_second_study_is_that_of_somebody_who_has_measured(tune: Tune, tmp_path: Path) -> None:
    for study in ("one", "two"):
        done = tune("--trials", "5", "--storage", url(tmp_path), "--study", study, "--results", study, *OWN)
        assert done.returncode == 0, done.stderr
    first, second = forecasts(tmp_path, "one"), forecasts(tmp_path, "two")
    assert second[0] < 0.1 < first[0]


def test_another_training_or_machine_teaches_nothing(tune: Tune, tmp_path: Path) -> None:
    tune("--trials", "3", "--storage", url(tmp_path), "--study", "one", "--results", "one", *OWN)
    store = StudyStore.load(url(tmp_path), "one")
    tune(
        "--trials",
        "3",
        "--storage",
        url(tmp_path),
        "--study",
        "longer",
        "--results",
        "longer",
        "--seq-len",
        "64",
        *OWN,
        space=SMALL,
    )
    longer = StudyStore.load(url(tmp_path), "longer")
    assert earlier_records(longer, identity_of(longer)) == []
    tune("--trials", "3", "--storage", url(tmp_path), "--study", "capped", "--results", "capped",
         "--memory-cap", "1GiB", *OWN)  # fmt: skip
    capped = StudyStore.load(url(tmp_path), "capped")
    assert earlier_records(capped, identity_of(capped)) == store.records()


def test_earlier_records_outside_the_space_are_learned_from_but_not_proposed(tune: Tune, tmp_path: Path) -> None:
    tune("--trials", "6", "--storage", url(tmp_path), "--study", "one", "--results", "one")
    store = StudyStore.load(url(tmp_path), "one")
    summary = store.summary()
    space = Space(Limits(ranks=2, max_micro_batch=1, max_global_batch=2))
    sampler = CostModelSampler(space, 0, CostModel(summary.workload, hardware_of(summary.machine)))
    before = sampler.forecast(space.legal[0], [])
    sampler.learn_from(store.records())
    after = sampler.forecast(space.legal[0], [])
    assert before is not None and after is not None
    assert after.peak_memory_deviation_bytes < before.peak_memory_deviation_bytes < GIB
    proposal = sampler.propose([], 0)
    assert proposal is not None and proposal.config in space.legal


def test_the_best_is_that_of_the_studys_own_trials_and_not_an_earlier_ones(tune: Tune, tmp_path: Path) -> None:
    """Knowing from an earlier study what is fastest is no reason to end before it has run in this one."""
    for study in ("one", "two"):
        tune("--trials", "12", "--storage", url(tmp_path), "--study", study, "--results", study, *OWN)
    first, second = (StudyStore.load(url(tmp_path), study).summary().best for study in ("one", "two"))
    assert first is not None and second is not None
    assert (second.samples_per_second or 0.0) >= 0.99 * (first.samples_per_second or 0.0)
