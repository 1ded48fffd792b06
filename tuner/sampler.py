"""The Optuna sampler of the search: TPE, made fit for few trials and for a space where no point repeats."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from objectives.trial import TrialConfig
from tuner.space import Space

# Optuna's default of 10 random trials would make all of `--trials 9` a random search.
STARTUP_TRIALS = 4

# TPE proposes what it has seen again and again near its optimum; so often it is asked before the nearest new
# configuration is taken instead.
ATTEMPTS = 16


class DistinctTPESampler(optuna.samplers.BaseSampler):
    """TPE over the legal configurations of a space, none of them twice.

    The proposals depend on the seed, the trial's number and the study's trials only, so that a resumed study goes
    on as the uninterrupted one would have.
    """

    def __init__(self, space: Space, seed: int) -> None:
        self._space = space
        self._seed = seed

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self._space.distributions)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if "fixed_params" in trial.system_attrs:
            return {}  # an enqueued trial brings its own
        candidates = unvisited(self._space, study.get_trials(deepcopy=False))
        assert candidates, "the study's loop asks for no trial when none is left"
        random = np.random.default_rng([self._seed, trial.number])
        names = {config.name for config in candidates}
        proposal: Mapping[str, Any] = {}
        for _ in range(ATTEMPTS):
            proposal = self._propose(study, trial, int(random.integers(2**31)))
            if not proposal:  # TPE's start-up phase
                return self._space.params(_spread(candidates, random))
            config = TrialConfig(**proposal)
            if config.name in names:
                return self._space.params(config)
        return self._space.params(self._space.nearest(proposal, candidates))

    def _propose(self, study: optuna.Study, trial: FrozenTrial, seed: int) -> dict[str, Any]:
        tpe = optuna.samplers.TPESampler(
            n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=False, seed=seed
        )
        return tpe.sample_relative(study, trial, dict(self._space.distributions))

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise AssertionError(f"{param_name} is not a dimension of the space")


def unvisited(space: Space, trials: Sequence[FrozenTrial]) -> list[TrialConfig]:
    """The legal configurations that no trial has, will have, or had before it was interrupted."""
    seen = set()
    for trial in trials:
        params = trial.system_attrs.get("fixed_params", {}) if trial.state is TrialState.WAITING else trial.params
        if set(params) == set(space.distributions):
            seen.add(TrialConfig(**params).name)
    return [config for config in space.legal if config.name not in seen]


def _spread(candidates: Sequence[TrialConfig], random: np.random.Generator) -> TrialConfig:
    """A random candidate, every doubling of a batch size as likely as the next: few trials must span orders."""
    weights = np.array([1 / (config.micro_batch_size * config.gradient_accumulation_steps) for config in candidates])
    return candidates[int(random.choice(len(candidates), p=weights / weights.sum()))]
