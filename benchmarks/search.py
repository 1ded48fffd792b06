"""How soon each way to search finds the best configuration of recorded machines.

    python benchmarks/search.py [benchmarks/data/*.jsonl] [--seeds 50] [--cap 60 80] [--policy ours tpe …]

Every policy answers the same question on every surface: what to run next, given what has been run. A run's rate is the
recorded one with 1% of noise, drawn for each seed; the configuration that looks fastest is judged by its recorded rate.
Printed are, for each surface and policy, the regret after 5, 9 and 20 trials (how much slower than the surface's best;
mean, 95th percentile, worst), the trials among the first 9 that ran out of memory, and the recorded seconds until the
chosen configuration was within 2% of the best (of the runs that got there in 20 trials, and how many did).

`--cap G` adds surfaces derived from the recorded ones: what peaked above G GiB, less 1.5% for fragments, counts as out
of memory. docs/cost-model.md says where the constants of `ours` come from. `ours-stops` ends when nothing is expected
to gain 1%; `ours-shuffled` has its predicted speeds dealt out at random, `ours-high` and `ours-low` its predicted bytes
30% off: what a wrong prior costs.
"""

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import optuna
import tabulate

from objectives.cost_model.calibration import TIGHT, TIGHT_ERROR, Observation
from objectives.cost_model.hardware import hardware_of
from objectives.cost_model.model import CostModel
from objectives.machine import GIB
from objectives.surface import Surface, read_surface
from objectives.trial import Failure, FailureKind, Measurement, Outcome, TrialConfig
from tuner.proposer import ENOUGH_GAIN, Proposer
from tuner.sampler import GridSampler, SpaceSampler, make_sampler
from tuner.space import Limits, Space

RUN_NOISE = 0.01
CHECKPOINTS = (5, 9, 20)
WITHIN = 0.02
DERIVED_FRAGMENTS = 0.015


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
        """What to run after these; None to stop."""


class Ours:
    """The cost model and its sampler's choice, without Optuna around it."""

    def __init__(
        self,
        surface: Surface,
        space: Space,
        seed: int,
        *,
        shuffled: bool = False,
        memory_factor: float = 1.0,
        stops: bool = False,
    ) -> None:
        model = CostModel(surface.workload, hardware_of(surface.machine))
        self._proposer = Proposer(model, space.legal)
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
        """What the runs so far say."""
        observations = []
        for run in runs:
            row = self._proposer.row(run.config)
            assert row is not None
            if run.rate is None:
                observations.append(Observation(row=row, ran_out=True))
            elif isinstance(run.outcome, Measurement):
                peak = float(run.outcome.peak_memory_bytes)
                error = TIGHT_ERROR if peak > TIGHT * self._capacity else 0.005
                observations.append(
                    Observation(row=row, log_rate=math.log(run.rate), relative_error=error, peak_bytes=peak)
                )
        return observations

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

    def __init__(self, surface: Surface, space: Space) -> None:
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


def _best_predicted(surface: Surface, space: Space, count: int) -> list[TrialConfig]:
    """The configurations that the cost model thinks fastest among those that fit, one a stage and kind."""
    proposer = Proposer(CostModel(surface.workload, hardware_of(surface.machine)), space.legal)
    rates, memory = proposer.beliefs([])
    order = np.argsort(-(rates.mean + np.log(np.maximum(memory.fits, 1e-9))))
    return [proposer.grid.configs[int(row)] for row in order[:count]]


MAKERS: dict[str, Callable[[Surface, Space, int], Policy]] = {
    "ours": lambda surface, space, seed: Ours(surface, space, seed),
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
}

FEW_SEEDS = {"gp": 5}
"""A policy that takes seconds to ask."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """What one search on one surface came to."""

    regrets: dict[int, float]
    out_of_memory: int
    """Among the first nine trials."""
    seconds_to_good: float | None
    trials: int
    ask_seconds: float


def search(surface: Surface, space: Space, policy: Policy, seed: int, trials: int) -> Search:
    """Runs one policy once."""
    random = np.random.default_rng([seed, 7])
    noise = {config: math.exp(RUN_NOISE * random.standard_normal()) for config in space.legal}
    truth = {config: surface.outcomes[config] for config in space.legal}
    best = max(outcome.samples_per_second for outcome in truth.values() if isinstance(outcome, Measurement))
    runs: list[Run] = []
    regrets: dict[int, float] = {}
    seconds, good_after, asking = 0.0, None, 0.0
    baselines = iter(space.baselines)
    while len(runs) < trials:
        config: TrialConfig | None
        if not any(run.rate for run in runs) and (config := next(baselines, None)) is not None:
            pass
        else:
            begun = time.perf_counter()
            config = policy.next(runs)
            asking += time.perf_counter() - begun
        if config is None:
            break
        outcome = truth[config]
        rate = outcome.samples_per_second * noise[config] if isinstance(outcome, Measurement) else None
        runs.append(Run(config=config, outcome=outcome, rate=rate))
        seconds += outcome.wall_seconds
        timed = [run for run in runs if run.rate is not None]
        chosen = max(timed, key=lambda run: run.rate or 0.0) if timed else None
        regret = 1.0
        if chosen is not None and isinstance(chosen.outcome, Measurement):
            regret = 1 - chosen.outcome.samples_per_second / best
        regrets[len(runs)] = regret
        if regret <= WITHIN and good_after is None:
            good_after = seconds
        elif regret > WITHIN:
            good_after = None
    last = regrets[len(runs)]
    return Search(
        regrets={count: regrets.get(count, last) for count in CHECKPOINTS},
        out_of_memory=sum(run.rate is None for run in runs[:9]),
        seconds_to_good=good_after,
        trials=len(runs),
        ask_seconds=asking / max(len(runs), 1),
    )


def capped(surface: Surface, cap_gib: float) -> Surface:
    """The surface as it would be under a memory cap, derived from the recorded peaks."""
    cap_bytes = int(cap_gib * GIB)
    outcomes: dict[TrialConfig, Outcome] = {}
    for config, outcome in surface.outcomes.items():
        if isinstance(outcome, Measurement) and outcome.peak_memory_bytes > (1 - DERIVED_FRAGMENTS) * cap_bytes:
            outcome = Failure(
                kind=FailureKind.OUT_OF_MEMORY, message="derived", phase="forward", wall_seconds=1.0,
                peak_memory_bytes=cap_bytes,
            )  # fmt: skip
        outcomes[config] = outcome
    machine = dataclasses.replace(surface.machine, memory_cap_bytes=cap_bytes)
    return dataclasses.replace(surface, machine=machine, outcomes=outcomes)


def space_of(surface: Surface) -> Space:
    ranks = surface.machine.ranks
    limits = Limits(
        ranks=ranks,
        max_micro_batch=max(config.micro_batch_size for config in surface.outcomes),
        max_global_batch=max(config.global_batch_size(ranks) for config in surface.outcomes),
    )
    return Space(limits, only=tuple(surface.outcomes))


def main() -> None:
    here = Path(__file__).parent / "data"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, default=sorted(here.glob("*.jsonl")))
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--cap", type=float, nargs="*", default=[], metavar="GIB")
    parser.add_argument("--policy", nargs="+", choices=MAKERS, default=list(MAKERS))
    parser.add_argument("--json", type=Path, help="also write every search to this file, a line each")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    headings = [
        "surface",
        "policy",
        *(f"regret after {count}" for count in CHECKPOINTS),
        "OOM in 9",
        "s to 2%",
        "trials",
    ]
    lines = []
    for path, cap in itertools.product(arguments.files, [None, *arguments.cap]):
        surface = read_surface(path)
        surface = capped(surface, cap) if cap is not None else surface
        if not any(isinstance(outcome, Measurement) for outcome in surface.outcomes.values()):
            print(f"{path.stem}: nothing fits in {cap:g} GiB, left out", file=sys.stderr)
            continue
        space = space_of(surface)
        name = path.stem if cap is None else f"{path.stem} ≤ {cap:g} GiB (derived)"
        for policy in arguments.policy:
            seeds = range(min(arguments.seeds, FEW_SEEDS.get(policy, arguments.seeds)))
            found = [search(surface, space, MAKERS[policy](surface, space, seed), seed, 20) for seed in seeds]
            lines.append([name, policy, *_figures(found)])
            print(json.dumps(dict(zip(headings, lines[-1], strict=True)), ensure_ascii=False), flush=True)
            if arguments.json:
                with arguments.json.open("a") as file:
                    for seed, each in zip(seeds, found, strict=True):
                        row = {"surface": name, "policy": policy, "seed": seed, **dataclasses.asdict(each)}
                        file.write(json.dumps(row) + "\n")
    print()
    print(tabulate.tabulate(lines, headings, tablefmt="pipe", disable_numparse=True))


def _figures(found: Sequence[Search]) -> list[str]:
    cells = []
    for count in CHECKPOINTS:
        regrets = sorted(each.regrets[count] for each in found)
        cells.append(
            f"{statistics.fmean(regrets):.1%} / {regrets[math.ceil(0.95 * len(regrets)) - 1]:.1%} / {regrets[-1]:.1%}"
        )
    good = [each.seconds_to_good for each in found if each.seconds_to_good is not None]
    cells.append(f"{statistics.fmean(each.out_of_memory for each in found):.1f}")
    cells.append(f"{statistics.fmean(good):.0f} ({len(good)}/{len(found)})" if good else f"– (0/{len(found)})")
    cells.append(f"{statistics.fmean(each.trials for each in found):.1f}")
    return cells


if __name__ == "__main__":
    main()
