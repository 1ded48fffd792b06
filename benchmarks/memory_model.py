"""Errors of predicted memory after two measured trials, on recorded machines; and seconds of a proposal.

    python benchmarks/memory_model.py [benchmarks/data/*.jsonl] [--seeds 20] [--cap 36 40 60 80]

Each search is `ours` of search.py. Once two of its trials have a measured peak, the predicted peaks of all other
recorded configurations are compared with what was recorded: the median, the 95th percentile and the largest of the
relative errors, and how many peaks lie inside their 95% interval.
At every trial, what the search holds for certain not to fit is compared with what did fit: `wrongly excluded` counts
those, over all trials of all searches. `--cap G` as in search.py.

The last line is the time of one proposal in a space of 5,000 configurations after 50 trials, on one core.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tabulate
from policies import Ours, Run
from search import capped, search, space_of

from ds_tune.objectives.cost_model.calibration import Observation
from ds_tune.objectives.cost_model.hardware import parse_hardware
from ds_tune.objectives.cost_model.model import CostModel
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.knobs import KnobContext
from ds_tune.objectives.recorded.recording import Recording, read_recording
from ds_tune.objectives.trial import Measurement, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.tuner.dimensions import dimensions_of
from ds_tune.tuner.limits import Limits
from ds_tune.tuner.proposer import Proposer
from ds_tune.tuner.space import Space

TRIALS = 20


class Watched(Ours):
    """`ours`, with its predictions compared on the way."""

    def __init__(self, surface: Recording, space: Space, seed: int) -> None:
        super().__init__(surface, space, seed)
        self._peaks = {
            row: outcome.peak_memory_bytes
            for config, outcome in surface.outcomes.items()
            if isinstance(outcome, Measurement) and (row := self._proposer.row(config)) is not None
        }
        self.errors: list[float] = []
        self.covered: list[bool] = []
        self.wrongly_excluded = 0

    def next(self, runs: Sequence[Run]) -> TrialConfig | None:
        observations = self.observations(runs)
        _, memory = self._proposer.beliefs(observations)
        excluded = memory.certainly_too_large
        self.wrongly_excluded += sum(bool(excluded[row]) for row in self._peaks)
        measured = {each.row for each in observations if each.peak_bytes is not None}
        if len(measured) == 2 and not self.errors:
            others = [row for row in self._peaks if row not in measured]
            self.errors = [abs(memory.mean_bytes[row] / self._peaks[row] - 1) for row in others]
            self.covered = [
                abs(memory.mean_bytes[row] - self._peaks[row]) < 1.96 * memory.deviation_bytes[row] for row in others
            ]
        return super().next(runs)


def memory_row(name: str, surface: Recording, seeds: int) -> list[str]:
    """One line of the table."""
    space = space_of(surface)
    errors: list[float] = []
    covered: list[bool] = []
    wrongly_excluded = trials = 0
    for seed in range(seeds):
        policy = Watched(surface, space, seed)
        trials += search(surface, space, policy, seed, TRIALS).trials
        errors += policy.errors
        covered += policy.covered
        wrongly_excluded += policy.wrongly_excluded
    median, most = statistics.median(errors), float(np.percentile(errors, 95))
    return [
        name,
        f"{median:.1%}",
        f"{most:.1%}",
        f"{max(errors):.1%}",
        f"{statistics.fmean(covered):.0%}",
        f"{wrongly_excluded} in {trials} trials",
    ]


def proposal_seconds() -> float:
    """The median of five proposals, with 50 trials all over the space."""
    hardware = parse_hardware("8xH200")
    model = CostModel(HuggingFaceWorkload(model="gpt2-xl", seq_len=1024, dtype="fp16"), hardware)
    limits = Limits(ranks=8, max_micro_batch=128, max_global_batch=128 * 8)
    context = KnobContext(ranks=8, vocabulary=50257, model_type="gpt2", compute_capability=(9, 0))
    configs = Space(limits, dimensions_of("full"), context=context).legal
    random = np.random.default_rng(0)
    chosen = [configs[index] for index in random.choice(len(configs), size=5000, replace=False)]
    proposer = Proposer(model, chosen)
    taken = [int(row) for row in random.choice(5000, size=50, replace=False)]
    observations = [
        Observation(
            row=row,
            log_rate=float(proposer.grid.log_rate[row] + 0.1 * random.standard_normal()),
            relative_error=0.005,
            peak_bytes=float(proposer.grid.peak_bytes[row]),
        )
        for row in taken
    ]
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        proposer.propose(observations, taken, random)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    here = Path(__file__).parent / "data"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, default=sorted(here.glob("*.jsonl")))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--cap", type=float, nargs="*", default=[], metavar="GIB")
    arguments = parser.parse_args()
    lines = []
    for path, cap in itertools.product(arguments.files, [None, *arguments.cap]):
        surface = read_recording(path)
        name = path.stem if cap is None else f"{path.stem} ≤ {cap:g} GiB (derived)"
        try:
            surface = surface if cap is None else capped(surface, cap)
        except UsageError as error:
            parser.error(str(error))
        lines.append(memory_row(name, surface, arguments.seeds))
    headings = ["surface", "median error", "95th percentile", "largest", "in 95% interval", "wrongly excluded"]
    print(tabulate.tabulate(lines, headings, tablefmt="pipe", disable_numparse=True))
    print(f"\none proposal among 5,000 configurations after 50 trials: {proposal_seconds():.2f} s")


if __name__ == "__main__":
    main()
