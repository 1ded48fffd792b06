"""Optuna's samplers propose legal configurations, none twice, and what they propose can be repeated."""

import re
from typing import Any

import optuna
import pytest

from ds_tune.objectives.trial import TrialConfig
from ds_tune.tuner.limits import Limits
from ds_tune.tuner.sampler import STARTUP_TRIALS, make_sampler, unvisited
from ds_tune.tuner.space import Space


def space_of(**changes: int) -> Space:
    return Space(Limits(**{"ranks": 2, "max_micro_batch": 8, "max_global_batch": 64, **changes}))


def new_study(space: Space, seed: int = 0, sampler: str = "tpe") -> optuna.Study:
    return optuna.create_study(direction="maximize", sampler=make_sampler(sampler, space, seed, None))


def answer(study: optuna.Study, trial: optuna.Trial, *, largest: int = 4) -> None:
    """Larger micro-batches are faster, and from `largest` on they do not fit."""
    micro_batch_size = trial.params["micro_batch_size"]
    if micro_batch_size > largest:
        trial.set_constraint("memory", 0.1)
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        return
    trial.set_constraint("memory", -0.1)
    study.tell(trial, micro_batch_size * (1 - 0.05 * trial.params["zero_stage"]))


def search(study: optuna.Study, space: Space, trials: int) -> list[str]:
    names = []
    for _ in range(trials):
        trial = study.ask(space.distributions)
        names.append(TrialConfig(**trial.params).name)
        answer(study, trial)
    return names


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid", "gp"])
@pytest.mark.parametrize("changes", [{}, {"global_batch": 64}], ids=["free batch", "fixed batch"])
def test_no_configuration_is_proposed_twice_and_all_are_legal(sampler: str, changes: dict[str, int]) -> None:
    space = space_of(**changes)
    names = search(new_study(space, 1, sampler), space, min(8 if sampler == "gp" else 20, len(space.legal)))
    assert len(set(names)) == len(names)
    assert set(names) <= {config.name for config in space.legal}


def test_the_gp_is_asked_once_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes half a second and insists; in place of what is not new comes what is nearest to it."""
    asked: list[int] = []
    sample = optuna.samplers.GPSampler.sample_relative

    def counted(self: optuna.samplers.GPSampler, *args: Any) -> dict[str, Any]:
        asked.append(1)
        return sample(self, *args)

    monkeypatch.setattr(optuna.samplers.GPSampler, "sample_relative", counted)
    space = space_of(max_micro_batch=4, max_global_batch=8)
    names = search(new_study(space, 2, "gp"), space, 8)
    assert len(asked) == len(set(names)) == 8


def test_a_small_space_is_searched_to_its_end() -> None:
    space = space_of(max_micro_batch=2, max_global_batch=4)
    study = new_study(space)
    names = search(study, space, len(space.legal))
    assert set(names) == {config.name for config in space.legal}
    assert unvisited(space, study.get_trials()) == []


def test_one_seed_gives_one_search_and_another_a_different_one() -> None:
    space = space_of()
    first, again, other = (search(new_study(space, seed), space, 12) for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize("stop_after", [1, STARTUP_TRIALS, STARTUP_TRIALS + 3])
def test_a_resumed_study_proposes_what_an_uninterrupted_one_would(stop_after: int, tmp_path: object) -> None:
    space = space_of()
    url = f"sqlite:///{tmp_path}/study.db"
    expected = search(new_study(space), space, 10)
    study = optuna.create_study(
        study_name="s", storage=url, direction="maximize", sampler=make_sampler("tpe", space, 0, None)
    )
    names = search(study, space, stop_after)
    resumed = optuna.load_study(study_name="s", storage=url, sampler=make_sampler("tpe", space, 0, None))
    names += search(resumed, space, 10 - stop_after)
    assert names == expected


def test_a_queued_configuration_is_taken_as_it_is() -> None:
    space = space_of()
    study = new_study(space)
    wanted = {"zero_stage": 3, "micro_batch_size": 7, "gradient_accumulation_steps": 2}
    study.enqueue_trial(wanted)
    assert study.ask(space.distributions).params == wanted


def test_queued_running_or_failed_configuration_counts_as_visited() -> None:
    space = space_of(max_micro_batch=1, max_global_batch=2)  # four configurations
    study = new_study(space)
    running = study.ask(space.distributions)
    failed = study.ask(space.distributions)
    study.tell(failed, state=optuna.trial.TrialState.FAIL)
    [first, second] = unvisited(space, study.get_trials())
    study.enqueue_trial(space.params(first))
    assert unvisited(space, study.get_trials()) == [second]
    assert {running.params["zero_stage"], failed.params["zero_stage"], first.zero_stage, second.zero_stage} == {
        0, 1, 2, 3,
    }  # fmt: skip


def test_the_search_learns_what_is_fast_and_what_does_not_fit() -> None:
    """Of 24 trials, those after the first half are mostly of sizes that fit, and the fastest size is among them."""
    fitting, fastest = 0, 0
    for seed in range(3):
        space = space_of()
        study = new_study(space, seed)
        search(study, space, 24)
        late = study.get_trials()[12:]
        fitting += sum(trial.state is optuna.trial.TrialState.COMPLETE for trial in late)
        fastest += sum(trial.params["micro_batch_size"] == 4 for trial in study.get_trials())
    assert fitting > 3 * 12 * 0.6
    assert fastest >= 3


def test_only_out_of_memory_so_far_stops_nothing() -> None:
    space = space_of()
    study = new_study(space)
    for _ in range(STARTUP_TRIALS + 3):
        answer(study, study.ask(space.distributions), largest=0)
    assert len(study.trials) == STARTUP_TRIALS + 3


def test_the_grid_begins_with_powers_of_two() -> None:
    space = space_of()
    first = search(new_study(space, sampler="grid"), space, 12)
    assert first[0] == "z0_gas1_tmbspg1"
    assert all(size & (size - 1) == 0 for name in first for size in map(int, re.findall(r"(?:gas|tmbspg)(\d+)", name)))
