"""Trials that a person enqueued through Optuna, such as `study.enqueue_trial({"zero_stage": 1})`, made fit to run."""

from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.trial import TrialState

from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.words import plain, shown
from ds_tune.storage.study_store import StudyStore
from ds_tune.tuner.sampler import unvisited
from ds_tune.tuner.space import Space

FIXED = "fixed_params"
"""Optuna's attribute of a waiting trial for the parameters that it will have."""


def put_right(store: StudyStore, space: Space, say: Callable[[str], None]) -> None:
    """Fills in what waiting trials leave out, and fails those that no configuration of the space can be.

    What is missing is as the best so far has it, or as near to that as there is a configuration that has not run.

    Args:
        say: told in one line what was done.
    """
    waiting = store.study.get_trials(deepcopy=False, states=[TrialState.WAITING])
    for trial in waiting:
        given = trial.system_attrs.get(FIXED, trial.params)
        if _can_run(given, space):
            continue
        where = f"trial {trial.number}, which was enqueued by hand"
        if (reason := _refusal(given, space)) is not None:
            store.storage.set_trial_user_attr(trial._trial_id, "reason", reason)
            store.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            say(f"{where}, is left out: {reason}.")
            continue
        config = _completed(given, store, space)
        store.storage.set_trial_system_attr(trial._trial_id, FIXED, space.params(config))
        say(f"{where} without all parameters, runs as {config.name}.")


def _can_run(given: Mapping[str, Any], space: Space) -> bool:
    if set(given) != set(space.distributions):
        return False
    config = TrialConfig(**given)
    if config in space.baselines or config in space.legal:
        return True
    return space.restricted_to is None and space.limits.allow(config) and not _outside(given, space)


def _outside(given: Mapping[str, Any], space: Space) -> list[str]:
    """Parameters with a value that the space does not have."""

    def has(distribution: optuna.distributions.BaseDistribution, value: Any) -> bool:
        if isinstance(distribution, optuna.distributions.CategoricalDistribution):
            return value in distribution.choices
        return isinstance(value, int) and not isinstance(value, bool) and distribution._contains(value)

    return [field for field, value in given.items() if not has(space.distributions[field], value)]


def _refusal(given: Mapping[str, Any], space: Space) -> str | None:
    """Why no configuration of the space has these values; None where one has."""
    if unknown := [field for field in given if field not in space.distributions]:
        return f"this study has no parameter {plain(unknown[0])}, but {', '.join(space.distributions)}"
    if outside := _outside(given, space):
        return f"{outside[0]}={shown(given[outside[0]])} is not in the space of this study"
    if not any(_has(config, given) for config in space.legal):
        words = ", ".join(f"{field}={shown(value)}" for field, value in given.items())
        return f"no configuration of this study has {words}"
    return None


def _has(config: TrialConfig, given: Mapping[str, Any]) -> bool:
    return all(getattr(config, field) == value for field, value in given.items())


def _completed(given: Mapping[str, Any], store: StudyStore, space: Space) -> TrialConfig:
    matching = [config for config in space.legal if _has(config, given)]
    new = set(unvisited(space, store.trials()))
    candidates = [config for config in matching if config in new] or matching
    best = store.summary().best
    if best is None:
        return candidates[0]
    return space.nearest({**space.params(best.config), **given}, candidates)
