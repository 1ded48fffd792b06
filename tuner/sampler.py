"""The Optuna samplers of the search: ds-tune's own, which asks the cost model, and Optuna's, made fit for the space.

All of them propose legal configurations only, none twice, and depend on the seed, the trial's number and the study's
stored trials alone, so that a resumed study goes on as the uninterrupted one would have.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from ds_tune.objectives.cost_model.calibration import Observation, observation_of
from ds_tune.objectives.cost_model.forecast import Excluded, Forecast
from ds_tune.objectives.cost_model.prior import Prior
from ds_tune.objectives.trial import TrialConfig
from ds_tune.storage.attributes import record_of
from ds_tune.storage.records import TrialRecord
from ds_tune.tuner.proposer import ENOUGH_GAIN, Proposal, Proposer
from ds_tune.tuner.space import Space
from ds_tune.tuner.stages import stages_left_out

STARTUP_TRIALS = 4
"""Optuna's default of 10 random trials would make all of nine trials a random search."""

EARLIER_ERROR = 0.02
"""Relative standard deviation of what an earlier study measured, as today would have it."""

ATTEMPTS = 16
"""Optuna's samplers propose what they have seen again and again near their optimum; so often one is asked before the
nearest new configuration is taken instead."""


class SpaceSampler(optuna.samplers.BaseSampler):
    """Base of all samplers of a `Space`, with what the study's loop asks each of them beside a proposal.

    One that predicts nothing has no more to say than the answers here.
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
        return self._space.params(self._choose(study, trial))

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise AssertionError(f"{param_name} is not a dimension of the space")

    def learn_from(self, records: Sequence[TrialRecord]) -> None:
        """Takes trials of earlier studies into account."""

    def forecast(self, config: TrialConfig, trials: Sequence[FrozenTrial]) -> Forecast | None:
        """Prediction for a configuration after these trials; None where there is none."""
        return None

    def excluded(self, trials: Sequence[FrozenTrial]) -> Sequence[Excluded]:
        """Configurations that certainly do not fit, after these trials."""
        return ()

    def baselines(self, trials: Sequence[FrozenTrial]) -> Sequence[TrialConfig]:
        """The space's baselines in the order to try them."""
        return self._space.baselines

    def settled(self, trials: Sequence[FrozenTrial]) -> str | None:
        """Why no further trial is worth its time; None to go on."""
        return None

    def _choose(self, study: optuna.Study, trial: FrozenTrial) -> TrialConfig:
        raise NotImplementedError

    def _random(self, number: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, number])


class CostModelSampler(SpaceSampler):
    """Expected improvement × probability of fitting, on the cost model as the study's trials have corrected it."""

    def __init__(self, space: Space, seed: int, prior: Prior) -> None:
        super().__init__(space, seed)
        self._prior = prior
        self.proposer = Proposer(prior, space.legal)
        self._earlier: list[Observation] = []

    def learn_from(self, records: Sequence[TrialRecord]) -> None:
        """Takes trials of earlier studies into account, with a little more doubt than the study's own."""
        self.proposer = Proposer(self._prior, self._space.legal, known=[record.config for record in records])
        self._earlier = []
        for record in records:
            row = self.proposer.row(record.config)
            assert row is not None
            observation = observation_of(row, record.outcome, record.machine.capacity_bytes)
            # That it ran out of memory under another cap says nothing about this one.
            if observation is not None and not observation.ran_out:
                error = max(observation.relative_error, EARLIER_ERROR)
                self._earlier.append(dataclasses.replace(observation, relative_error=error, from_this_study=False))

    def _choose(self, study: optuna.Study, trial: FrozenTrial) -> TrialConfig:
        proposal = self.propose(study.get_trials(deepcopy=False), trial.number)
        assert proposal is not None, "the study's loop asks for no trial when none is left"
        return proposal.config

    def propose(self, trials: Sequence[FrozenTrial], number: int) -> Proposal | None:
        """Proposal for trial `number`; None when nothing that is left can fit."""
        return self.proposer.propose(self.observations(trials), self._taken(trials), self._random(number))

    def forecast(self, config: TrialConfig, trials: Sequence[FrozenTrial]) -> Forecast | None:
        """Prediction for a configuration after these trials; None for one that is not of the space, and
        where nothing was predicted."""
        row = self.proposer.row(config)
        if row is None or not self._prior.predicts:
            return None
        return self.proposer.forecast(row, *self.proposer.beliefs(self.observations(trials)))

    def excluded(self, trials: Sequence[FrozenTrial]) -> list[Excluded]:
        """See `SpaceSampler`; of each kind the smallest, as `Proposer.excluded` has it."""
        _, memory = self.proposer.beliefs(self.observations(trials))
        return self.proposer.excluded(memory, self._taken(trials))

    def baselines(self, trials: Sequence[FrozenTrial]) -> list[TrialConfig]:
        """Baselines of the space in the order to try them, as `Proposer.baselines` has it.

        A person's own configuration comes first whatever is believed of it: it has run.
        """
        own = [] if self._space.own is None else [self._space.own]
        others = self.proposer.baselines(self._space.baselines, self.observations(trials))
        return [*own, *(config for config in others if config not in own)]

    def settled(self, trials: Sequence[FrozenTrial]) -> str | None:
        proposal = self.propose(trials, len(trials))
        if proposal is None:
            return "none of the configurations that are left can fit"
        found = any(each.log_rate is not None and each.from_this_study for each in self.observations(trials))
        if not found or proposal.expected_gain >= ENOUGH_GAIN:
            return None
        return f"no configuration that is left is expected to be {ENOUGH_GAIN:.1%} faster (`more=M` tries M more)"

    def _taken(self, trials: Sequence[FrozenTrial]) -> list[int]:
        rows = (self.proposer.row(config) for config in closed(self._space, trials))
        return [row for row in rows if row is not None]

    def observations(self, trials: Sequence[FrozenTrial]) -> list[Observation]:
        """Observations from the finished trials, those of other spaces left out."""
        observations: list[Observation | None] = [*self._earlier]
        for trial in trials:
            record = record_of(trial) if trial.state.is_finished() else None
            if record is None:
                continue
            row = self.proposer.row(record.config)
            if row is not None:
                observations.append(observation_of(row, record.outcome, record.machine.capacity_bytes))
        return [each for each in observations if each is not None]


class DistinctSampler(SpaceSampler):
    """One of Optuna's samplers over the legal configurations, none of them twice."""

    def __init__(
        self, space: Space, seed: int, make: Callable[[int], optuna.samplers.BaseSampler], *, attempts: int = ATTEMPTS
    ) -> None:
        """
        Args:
            make: the sampler for one proposal, from its seed.
            attempts: proposals until the nearest legal configuration is taken in place of one that is not, or was.
        """
        super().__init__(space, seed)
        self._make = make
        self._attempts = attempts

    def _choose(self, study: optuna.Study, trial: FrozenTrial) -> TrialConfig:
        candidates = unvisited(self._space, study.get_trials(deepcopy=False))
        assert candidates, "the study's loop asks for no trial when none is left"
        random = self._random(trial.number)
        names = {config.name for config in candidates}
        proposal: Mapping[str, Any] = {}
        for _ in range(self._attempts):
            sampler = self._make(int(random.integers(2**31)))
            proposal = sampler.sample_relative(study, trial, dict(self._space.distributions))
            if not proposal:  # the sampler's start-up phase
                return _spread(candidates, random)
            config = TrialConfig(**proposal)
            if config.name in names:
                return config
        return self._space.nearest(proposal, candidates)


class RandomSampler(SpaceSampler):
    """Any legal configuration, every doubling of a batch size as likely as the next."""

    def _choose(self, study: optuna.Study, trial: FrozenTrial) -> TrialConfig:
        return _spread(unvisited(self._space, study.get_trials(deepcopy=False)), self._random(trial.number))


class GridSampler(SpaceSampler):
    """The powers of two, the smallest batches of each ZeRO stage first; then what is between them."""

    def _choose(self, study: optuna.Study, trial: FrozenTrial) -> TrialConfig:
        def is_between(config: TrialConfig) -> bool:
            sizes = config.micro_batch_size, config.gradient_accumulation_steps
            return any(size & (size - 1) for size in sizes)

        # min takes the first of those that are level, and the candidates are in the space's order.
        return min(unvisited(self._space, study.get_trials(deepcopy=False)), key=is_between)


def _tpe(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(
        n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=False, seed=seed
    )


def _gp(seed: int) -> optuna.samplers.BaseSampler:
    # Imports torch into the tuner's own process: for comparisons, not the default.
    return optuna.samplers.GPSampler(n_startup_trials=STARTUP_TRIALS, deterministic_objective=False, seed=seed)


SAMPLERS: dict[str, Callable[[Space, int], SpaceSampler]] = {
    "tpe": lambda space, seed: DistinctSampler(space, seed, _tpe),
    # It takes half a second and says much the same again: of 29 proposals that were no new configuration, up to 15 more
    # attempts gave one in two cases.
    "gp": lambda space, seed: DistinctSampler(space, seed, _gp, attempts=1),
    "random": lambda space, seed: RandomSampler(space, seed),
    "grid": lambda space, seed: GridSampler(space, seed),
}
"""Samplers that need no cost model, by their name in a request."""

OWN = "cost-model"


def make_sampler(name: str, space: Space, seed: int, prior: Prior | None) -> SpaceSampler:
    """The sampler of that name.

    Args:
        prior: needed by ds-tune's own sampler alone.
    """
    if name == OWN:
        assert prior is not None
        return CostModelSampler(space, seed, prior)
    return SAMPLERS[name](space, seed)


def visited(space: Space, trials: Sequence[FrozenTrial]) -> list[TrialConfig]:
    """The configurations that a trial has, will have, or had before it was interrupted."""
    seen = []
    for trial in trials:
        params = trial.system_attrs.get("fixed_params", {}) if trial.state is TrialState.WAITING else trial.params
        if set(params) == set(space.distributions):
            seen.append(TrialConfig(**params))
    return seen


def closed(space: Space, trials: Sequence[FrozenTrial]) -> list[TrialConfig]:
    """The configurations that are not to be proposed any more."""
    stages = stages_left_out(space, trials)
    return [*visited(space, trials), *(config for config in space.legal if config.zero_stage in stages)]


def unvisited(space: Space, trials: Sequence[FrozenTrial]) -> list[TrialConfig]:
    """The legal configurations that are left."""
    seen = set(closed(space, trials))
    return [config for config in space.legal if config not in seen]


def _spread(candidates: Sequence[TrialConfig], random: np.random.Generator) -> TrialConfig:
    """A random candidate, every doubling of a batch size as likely as the next: few trials must span orders."""
    weights = np.array([1 / (config.micro_batch_size * config.gradient_accumulation_steps) for config in candidates])
    return candidates[int(random.choice(len(candidates), p=weights / weights.sum()))]
