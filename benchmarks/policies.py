"""The ways to search that search.py compares, each told what has been run and asked for what is next."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import optuna

from ds_tune.objectives.cost_model.calibration import Observation, observation_of
from ds_tune.objectives.cost_model.hardware import hardware_of
from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.cost_model.prior import FlatPrior
from ds_tune.objectives.recorded.recording import Recording
from ds_tune.objectives.trial import Measurement, Outcome, TrialConfig
from ds_tune.tuner.proposer import ENOUGH_GAIN, Proposer
from ds_tune.tuner.sampler import GridSampler, SpaceSampler, make_sampler
from ds_tune.tuner.space import Space


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One trial of a simulated search."""

    config: TrialConfig
    outcome: Outcome
    rate: float | None
    """With this seed's noise; None where it ran out of memory."""


class Policy(Protocol):
    """A way to search one surface."""

    def next(self, runs: Sequence[Run]) -> TrialConfig | None:
        """Configuration to run after these; None to stop."""


class Ours:
    """The cost model and its sampler's choice, without Optuna around it."""

    def __init__(
        self,
        surface: Recording,
        space: Space,
        seed: int,
        *,
        shuffled: bool = False,
        memory_factor: float = 1.0,
        stops: bool = False,
        flat: bool = False,
    ) -> None:
        hardware = hardware_of(surface.machine)
        prior = FlatPrior(hardware) if flat else CostModel(surface.workload, hardware)
        self._proposer = Proposer(prior, space.legal)
        self._random = np.random.default_rng(seed)
        self._capacity = float(surface.machine.capacity_bytes)
        self._stops = stops
        grid = self._proposer.grid
        if shuffled:
            dealt = self._random.permutation(grid.log_rate)
            self._proposer.grid = dataclasses.replace(grid, log_rate=dealt)
        if memory_factor != 1.0:
            self._proposer.grid = dataclasses.replace(
                grid,
                states_bytes=grid.states_bytes * memory_factor,
                activation_bytes=grid.activation_bytes * memory_factor,
                peak_bytes=grid.peak_bytes * memory_factor,
            )

    def observations(self, runs: Sequence[Run]) -> list[Observation]:
        """Observations of the runs so far."""
        observations = []
        for run in runs:
            row = self._proposer.row(run.config)
            assert row is not None
            said = observation_of(row, run.outcome, self._capacity)
            assert said is not None
            if run.rate is not None:
                said = dataclasses.replace(said, log_rate=math.log(run.rate))
            observations.append(said)
        return observations

    def baselines(self, configs: Sequence[TrialConfig], runs: Sequence[Run]) -> list[TrialConfig]:
        """The baselines in the order to try them."""
        return self._proposer.baselines(configs, self.observations(runs))

    def next(self, runs: Sequence[Run]) -> TrialConfig | None:
        taken = [row for run in runs if (row := self._proposer.row(run.config)) is not None]
        proposal = self._proposer.propose(self.observations(runs), taken, self._random)
        if proposal is None or (self._stops and runs and proposal.expected_gain < ENOUGH_GAIN):
            return None
        return proposal.config


class OfOptuna:
    """One of `tuner.sampler`'s samplers on a study in memory, told what ds-tune tells it."""

    def __init__(self, space: Space, make: Callable[[], SpaceSampler], first: Sequence[TrialConfig] = ()) -> None:
        self._space = space
        self._study = optuna.create_study(direction="maximize", sampler=make())
        for config in first:
            self._study.enqueue_trial(space.params(config))
        self._told = 0

    def next(self, runs: Sequence[Run]) -> TrialConfig | None:
        for run in runs[self._told :]:
            # The baseline was not asked for, and what was asked for last is told now.
            trial = optuna.trial.create_trial(
                params=self._space.params(run.config),
                distributions=self._space.distributions,
                value=run.rate,
                state=optuna.trial.TrialState.PRUNED if run.rate is None else optuna.trial.TrialState.COMPLETE,
                system_attrs={"constraints": [0.1 if run.rate is None else -0.1]},
            )
            self._study.add_trial(trial)
        self._told = len(runs)
        asked = self._study.ask(self._space.distributions)
        config = TrialConfig(**asked.params)
        # It comes back as a finished trial; the open one must not be seen as a second.
        self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
        return config if config not in {run.config for run in runs} else self.next_new(runs)

    def next_new(self, runs: Sequence[Run]) -> TrialConfig | None:
        left = [config for config in self._space.legal if config not in {run.config for run in runs}]
        return left[0] if left else None


class DeepSpeedFast:
    """DeepSpeed's autotuner in its fast mode with stage "all", as its documentation and source tell it.

    For each stage in turn: the largest micro-batch, from its memory formula, corrected by trying; then two smaller
    ones, evenly spaced, with the gradient accumulation that keeps the batch of the largest.
    """

    def __init__(self, surface: Recording, space: Space) -> None:
        model = CostModel(surface.workload, hardware_of(surface.machine))
        capacity = surface.machine.capacity_bytes
        self._queue: list[Callable[[Sequence[Run]], TrialConfig | None]] = []
        plain = [config for config in space.legal if config.activation_checkpointing == 0]
        for stage in range(4):
            of_stage = [config for config in plain if config.zero_stage == stage]
            sizes = sorted({config.micro_batch_size for config in of_stage})
            guess = max(
                (
                    size
                    for size in sizes
                    if model.predict(
                        TrialConfig(zero_stage=stage, micro_batch_size=size, gradient_accumulation_steps=1)
                    ).memory.peak_bytes
                    <= capacity
                ),
                default=None,
            )
            if guess is not None:
                self._plan_stage(of_stage, sizes, guess)

    def _plan_stage(self, configs: list[TrialConfig], sizes: list[int], guess: int) -> None:
        state: dict[str, int | None] = {"fits": None}
        at = sizes.index(guess)
        order = [sizes[index] for index in (at + 1, at, at - 1, at - 2) if 0 <= index < len(sizes)]

        def probe(size: int) -> Callable[[Sequence[Run]], TrialConfig | None]:
            def choose(runs: Sequence[Run]) -> TrialConfig | None:
                self._learn(runs, state, configs)
                if state["fits"] is not None:
                    return None
                return self._at(configs, size, 1)

            return choose

        def smaller(fraction: float) -> Callable[[Sequence[Run]], TrialConfig | None]:
            def choose(runs: Sequence[Run]) -> TrialConfig | None:
                self._learn(runs, state, configs)
                largest = state["fits"]
                if largest is None:
                    return None
                size = max((size for size in sizes if size <= largest * fraction), default=None)
                return None if size is None else self._at(configs, size, max(largest // size, 1))

            return choose

        self._queue += [probe(size) for size in order] + [smaller(2 / 3), smaller(1 / 3)]

    @staticmethod
    def _learn(runs: Sequence[Run], state: dict[str, int | None], configs: list[TrialConfig]) -> None:
        fitting = [
            run.config.micro_batch_size for run in runs if run.config in configs and run.rate is not None
            and run.config.micro_batch_size > 1
        ]  # fmt: skip
        if fitting and state["fits"] is None:
            state["fits"] = max(fitting)

    @staticmethod
    def _at(configs: list[TrialConfig], size: int, gas: int) -> TrialConfig | None:
        of_size = [config for config in configs if config.micro_batch_size == size]
        return min(of_size, key=lambda config: abs(config.gradient_accumulation_steps - gas), default=None)

    def next(self, runs: Sequence[Run]) -> TrialConfig | None:
        done = {run.config for run in runs}
        while self._queue:
            config = self._queue.pop(0)(runs)
            if config is not None and config not in done:
                return config
        return None


class Oracle:
    """Runs the fastest first, as it knows them: what the noise of single runs takes from every policy."""

    def __init__(self, surface: Recording) -> None:
        rates = {
            config: outcome.samples_per_second
            for config, outcome in surface.outcomes.items()
            if isinstance(outcome, Measurement)
        }
        self._order = sorted(rates, key=lambda config: -rates[config])

    def next(self, runs: Sequence[Run]) -> TrialConfig | None:
        done = {run.config for run in runs}
        return next((config for config in self._order if config not in done), None)


def _best_predicted(surface: Recording, space: Space, count: int) -> list[TrialConfig]:
    """The configurations that the cost model thinks fastest among those that fit, one a stage and kind."""
    proposer = Proposer(CostModel(surface.workload, hardware_of(surface.machine)), space.legal)
    rates, memory = proposer.beliefs([])
    order = np.argsort(-(rates.mean + np.log(np.maximum(memory.fits, 1e-9))))
    return [proposer.grid.configs[int(row)] for row in order[:count]]


MAKERS: dict[str, Callable[[Recording, Space, int], Policy]] = {
    "ours": lambda surface, space, seed: Ours(surface, space, seed),
    "ours-flat": lambda surface, space, seed: Ours(surface, space, seed, flat=True),
    "ours-stops": lambda surface, space, seed: Ours(surface, space, seed, stops=True),
    "ours-shuffled": lambda surface, space, seed: Ours(surface, space, seed, shuffled=True),
    "ours-high": lambda surface, space, seed: Ours(surface, space, seed, memory_factor=1.3),
    "ours-low": lambda surface, space, seed: Ours(surface, space, seed, memory_factor=0.7),
    "tpe": lambda surface, space, seed: OfOptuna(space, lambda: make_sampler("tpe", space, seed, None)),
    "tpe-prior": lambda surface, space, seed: OfOptuna(
        space, lambda: make_sampler("tpe", space, seed, None), _best_predicted(surface, space, 3)
    ),
    "gp": lambda surface, space, seed: OfOptuna(space, lambda: make_sampler("gp", space, seed, None)),
    "random": lambda surface, space, seed: OfOptuna(space, lambda: make_sampler("random", space, seed, None)),
    "grid": lambda surface, space, seed: OfOptuna(space, lambda: GridSampler(space, seed)),
    "deepspeed-fast": lambda surface, space, seed: DeepSpeedFast(surface, space),
    "oracle": lambda surface, space, seed: Oracle(surface),
}
