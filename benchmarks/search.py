"""Trials and seconds that each way to search needs to find the best configuration of recorded machines.

    python benchmarks/search.py [benchmarks/data/*.jsonl] [--seeds 50] [--cap 60 80] [--policy ours tpe …]

Every policy answers the same question on every surface: what to run next, given what has been run. A run's rate is the
recorded one with 1% of noise, drawn for each seed; the configuration that looks fastest is judged by its recorded rate.
Printed are, for each surface and policy, the regret after 5, 9 and 20 trials (how much slower than the surface's best;
mean, 95th percentile, worst), the trials among the first 9 that ran out of memory, and the recorded seconds until the
chosen configuration was within 2% of the best (of the runs that got there in 20 trials, and how many did).
benchmarks/results/searches.md keeps the table of the last full run.

`--cap G` adds surfaces derived from the recorded ones: what peaked above G GiB, less what it loses to fragments, counts
as out of memory: of its large tensors the share that least_memory.py measured of that model, in the median.
`ours-stops` ends when nothing is expected to gain
0.3%; `ours-flat` knows nothing of the model; `ours-shuffled` has its predicted speeds dealt out at random, `ours-high`
and `ours-low` its predicted bytes 30% off: what a wrong prior costs. `oracle` knows the surface: what it loses,
the noise takes from every policy. Each begins with the baselines until one fits; `ours` leaves out what cannot, as
the study's loop does.
"""

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import optuna
import tabulate
from least_memory import lost_shares
from policies import MAKERS, Ours, Policy, Run

from ds_tune.objectives.cost_model.calibration import TRIAL_NOISE
from ds_tune.objectives.cost_model.hardware import hardware_of
from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.machine import GIB
from ds_tune.objectives.recorded.recording import Recording, read_recording
from ds_tune.objectives.trial import Failure, FailureKind, Measurement, Outcome, TrialConfig
from ds_tune.tuner.limits import Limits
from ds_tune.tuner.space import Space

CHECKPOINTS = (5, 9, 20)
WITHIN = 0.02
DATA = Path(__file__).parent / "data"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """Result of one search on one surface."""

    regrets: dict[int, float]
    out_of_memory: int
    """Among the first nine trials."""
    seconds_to_good: float | None
    seconds: float
    """Recorded, of all its trials."""
    trials: int
    ask_seconds: float


def search(surface: Recording, space: Space, policy: Policy, seed: int, trials: int) -> Search:
    """Runs one policy once."""
    random = np.random.default_rng([seed, 7])
    noise = {config: math.exp(TRIAL_NOISE * random.standard_normal()) for config in space.legal}
    truth = {config: surface.outcomes[config] for config in space.legal}
    best = max(outcome.samples_per_second for outcome in truth.values() if isinstance(outcome, Measurement))
    runs: list[Run] = []
    regrets: dict[int, float] = {}
    seconds, good_after, asking = 0.0, None, 0.0
    while len(runs) < trials:
        config: TrialConfig | None = None
        if not any(run.rate for run in runs):
            tried = {run.config for run in runs}
            in_turn = policy.baselines(space.baselines, runs) if isinstance(policy, Ours) else space.baselines
            config = next((config for config in in_turn if config not in tried), None)
        if config is None:
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
        seconds=seconds,
        trials=len(runs),
        ask_seconds=asking / max(len(runs), 1),
    )


def capped(surface: Recording, cap_gib: float) -> Recording:
    """The surface as it would be under a memory cap, derived from the recorded peaks.

    Raises:
        UsageError: what its model loses to fragments was never recorded.
    """
    cap_bytes = int(cap_gib * GIB)
    model = CostModel(surface.workload, hardware_of(surface.machine))
    recorded = sorted((DATA / "fragments").glob(f"*.{surface.workload.model}.jsonl"))
    shares = [share for path in recorded for share in lost_shares(path)]
    if not shares:
        raise UsageError(
            f"--cap needs what {surface.workload.model} loses to fragments, which is not recorded in {DATA}/fragments: "
            "record it with least_memory.py, or leave the surfaces of that model out"
        )
    share = statistics.median(shares)
    outcomes: dict[TrialConfig, Outcome] = {}
    for config, outcome in surface.outcomes.items():
        lost = share * model.predict(config).memory.large_bytes
        if isinstance(outcome, Measurement) and outcome.peak_memory_bytes + lost > cap_bytes:
            outcome = Failure(
                kind=FailureKind.OUT_OF_MEMORY, message="derived", phase="forward", wall_seconds=1.0,
                peak_memory_bytes=cap_bytes,
            )  # fmt: skip
        outcomes[config] = outcome
    machine = dataclasses.replace(surface.machine, memory_cap_bytes=cap_bytes)
    return dataclasses.replace(surface, machine=machine, outcomes=outcomes)


def space_of(surface: Recording) -> Space:
    ranks = surface.machine.ranks
    limits = Limits(
        ranks=ranks,
        max_micro_batch=max(config.micro_batch_size for config in surface.outcomes),
        max_global_batch=max(config.global_batch_size(ranks) for config in surface.outcomes),
    )
    return Space(limits, restricted_to=tuple(surface.outcomes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, default=sorted(DATA.glob("*.jsonl")))
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
        "s in all",
        "trials",
    ]
    lines = []
    for path, cap in itertools.product(arguments.files, [None, *arguments.cap]):
        surface = read_recording(path)
        try:
            surface = capped(surface, cap) if cap is not None else surface
        except UsageError as error:
            parser.error(str(error))
        if not any(isinstance(outcome, Measurement) for outcome in surface.outcomes.values()):
            print(f"{path.stem}: nothing fits in {cap:g} GiB, left out", file=sys.stderr)
            continue
        space = space_of(surface)
        name = path.stem if cap is None else f"{path.stem} ≤ {cap:g} GiB (derived)"
        for policy in arguments.policy:
            seeds = range(arguments.seeds)
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
    cells.append(f"{statistics.fmean(each.seconds for each in found):.0f}")
    cells.append(f"{statistics.fmean(each.trials for each in found):.1f}")
    return cells


if __name__ == "__main__":
    main()
