"""How often the right winner is named where somebody else uses the machine, too.

    python benchmarks/busy_machine.py [--studies 300] [--seed 0] [--json FILE]

Each study is a search of nine trials and the verification of its finalists by the rules of `objectives.timing`,
`storage.finalists`, `storage.verdict` and `tuner.verification`, on a machine whose clock runs through: what slows it
slows whatever is timed then. The true seconds of a step are drawn for each study: the fastest, one that is 5% slower,
one 15%, and others 20 to 60%. A row a kind of noise:

`right` is how often the fastest, or one within 2% of it, is the winner, and `loss` how much slower the winner is on
average and in the 95th percentile; `told` how often the verification says that it cannot tell; `covered` how often the
95% interval of the winner's speed-up over the baseline holds the true one, of those that are given as an answer
(`answers`); `runs` and `seconds` are what the verification takes.
"""

import argparse
import bisect
import dataclasses
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import tabulate

from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.timing.intervals import step_ci95, throughput, warmup_length
from ds_tune.objectives.timing.step_plan import PRECISE, StepPlan, is_hopeless
from ds_tune.objectives.trial import Measurement, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.storage.records import Source, StudySummary, TrialRecord
from ds_tune.tuner.verification import next_runs

MACHINE = Machine(device="cpu", name="a busy machine", ranks=2, memory_bytes=9 * GIB)
START_SECONDS = {"search": 1.0, "verification": 12.0}
"""Before the first step: warm ranks, and fresh ones."""
RUN_NOISE = 0.005
STEP_NOISE = 0.01

Slowdown: TypeAlias = Callable[[float, np.random.Generator], float]
"""How many times longer a step takes that begins at this second of the study."""


def quiet(random: np.random.Generator) -> Slowdown:
    return lambda second, steps: 1.0


def drift(random: np.random.Generator) -> Slowdown:
    """Slower and faster again by a half, over minutes."""
    period, phase = random.uniform(120, 400), random.uniform(0, 2 * math.pi)
    return lambda second, steps: 1.25 + 0.25 * math.sin(2 * math.pi * second / period + phase)


def bimodal(random: np.random.Generator) -> Slowdown:
    """Two steps of five take 1.8 times as long."""
    return lambda second, steps: 1.8 if steps.random() < 0.4 else 1.0


def neighbour(random: np.random.Generator) -> Slowdown:
    """Another job comes for about 15 s, and is gone for about 25 s."""
    ends, second = [], 0.0
    while second < 3600:
        second += random.exponential(25.0 if len(ends) % 2 == 0 else 15.0)
        ends.append(second)
    factor = random.uniform(1.4, 2.2)
    return lambda second, steps: factor if bisect.bisect(ends, second) % 2 else 1.0


def heavy(random: np.random.Generator) -> Slowdown:
    """All of it at once, and each step at random."""
    parts = [drift(random), neighbour(random)]
    return lambda second, steps: (
        math.prod(part(second, steps) for part in parts) * math.exp(0.2 * abs(steps.standard_normal()))
    )


NOISES: dict[str, Callable[[np.random.Generator], Slowdown]] = {
    "quiet": quiet,
    "drift": drift,
    "bimodal": bimodal,
    "neighbour": neighbour,
    "all at once": heavy,
}


class BusyMachine:
    """Times configurations as a trial does, while its clock goes on."""

    def __init__(self, slowdown: Slowdown, random: np.random.Generator) -> None:
        self.seconds = 0.0
        self._slowdown = slowdown
        self._random = random

    def run(self, config: TrialConfig, step_seconds: float, plan: StepPlan, start_seconds: float,
            best_samples_per_second: float | None = None) -> Measurement:  # fmt: skip
        began = self.seconds
        self.seconds += start_seconds
        own = math.exp(RUN_NOISE * self._random.standard_normal())
        samples = config.global_batch_size(MACHINE.ranks)
        best = samples / best_samples_per_second if best_samples_per_second else None
        for _ in range(plan.warmup(config.zero_stage)):
            self._step(step_seconds * own)
        steps: list[float] = []
        while count := plan.next_steps(steps, best):
            steps += [self._step(step_seconds * own) for _ in range(count)]
        timed = steps[warmup_length(steps) :]
        rate, interval = throughput(timed, samples, step_ci95(timed))
        return Measurement(
            step_seconds=tuple(timed),
            samples_per_second=rate,
            samples_per_second_ci95=interval,
            forward_seconds=0.3,
            backward_seconds=0.6,
            optimizer_seconds=0.1,
            deepspeed_samples_per_second=None,
            warmup_step_seconds=(1.0,),
            skipped_steps=0,
            stopped_early=best is not None and is_hopeless(steps, best),
            peak_memory_bytes=GIB + 2**20 * config.micro_batch_size,
            reserved_memory_bytes=GIB,
            alloc_retries=0,
            setup_seconds=start_seconds,
            wall_seconds=self.seconds - began,
            model_parameters=1,
            flops_per_sample=1.0,
        )

    def _step(self, usual_seconds: float) -> float:
        seconds = usual_seconds * self._slowdown(self.seconds, self._random)
        seconds *= math.exp(STEP_NOISE * self._random.standard_normal())
        self.seconds += seconds
        return seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Result of one study."""

    loss: float
    """How much slower the winner is than the fastest."""
    told: bool
    """It says that it cannot tell."""
    covered: bool | None
    """None where no interval was given."""
    runs: int
    seconds: float


def study(make: Callable[[np.random.Generator], Slowdown], seed: int) -> Result:
    """A search and its verification; the configurations differ in their batch sizes alone."""
    random = np.random.default_rng(seed)
    machine = BusyMachine(make(random), random)
    ratios = [1.0, 1.05, 1.15, *(random.uniform(1.2, 1.6) for _ in range(5))]
    ratios = [ratios[index] for index in random.permutation(len(ratios))]
    ratios = [2.5, *ratios]  # the baseline
    configs = [TrialConfig(zero_stage=1, micro_batch_size=4, gradient_accumulation_steps=n + 1) for n in range(9)]
    base = random.uniform(0.1, 0.6)
    step_seconds = {
        config: base * ratio * (number + 1)
        for number, (config, ratio) in enumerate(zip(configs, ratios, strict=True))
    }  # fmt: skip
    true = dict(zip(configs, ratios, strict=True))
    records: list[TrialRecord] = []
    for number, config in enumerate(configs):
        best = max((record.samples_per_second or 0.0 for record in records), default=None)
        outcome = machine.run(config, step_seconds[config], StepPlan(), START_SECONDS["search"], best)
        records.append(
            TrialRecord(
                number=number,
                config=config,
                outcome=outcome,
                source=Source.SEARCH if number else Source.BASELINE,
                started_at="",
                machine=MACHINE,
                versions={},
            )
        )
    summary = StudySummary(
        study="busy", workload=HuggingFaceWorkload(model="gpt2", seq_len=1, dtype="fp32"), machine=MACHINE, versions={},
        trials_total=9, tuning_seconds=machine.seconds, ended=None, records=records,
    )  # fmt: skip
    runs: dict[str, list[Measurement]] = {}
    while turn := next_runs(summary):
        for record in turn:
            plan = PRECISE
            again = machine.run(record.config, step_seconds[record.config], plan, START_SECONDS["verification"])
            runs.setdefault(record.config.name, []).append(again)
        summary = dataclasses.replace(summary, verification=runs)
    verdict = summary.verdict
    assert verdict is not None
    [winner] = [record for record in records if record.config.name == verdict.leader]
    speedup = summary.speedup
    assert speedup is not None
    low, high = speedup.ci95
    return Result(
        loss=true[winner.config] / min(ratios) - 1,
        told=bool(verdict.unsettled),
        covered=low <= ratios[0] / true[winner.config] <= high if speedup.settled else None,
        runs=sum(map(len, runs.values())),
        seconds=summary.verification_seconds,
    )


def row(name: str, results: list[Result]) -> dict[str, str | float]:
    """Figures of one kind of noise."""
    covered = [result.covered for result in results if result.covered is not None]
    losses = [result.loss for result in results]
    return {
        "noise": name,
        "right": statistics.fmean(loss <= 0.02 for loss in losses),
        "loss": statistics.fmean(losses),
        "loss_p95": float(np.percentile(losses, 95)),
        "told": statistics.fmean(result.told for result in results),
        "covered": statistics.fmean(covered) if covered else math.nan,
        "answers": len(covered) / len(results),
        "runs": statistics.fmean(result.runs for result in results),
        "seconds": statistics.fmean(result.seconds for result in results),
    }


FORMATS = {"right": ".0%", "loss": ".1%", "loss_p95": ".1%", "told": ".0%", "covered": ".0%", "answers": ".0%",
           "runs": ".1f", "seconds": ".0f"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    rows = [
        row(name, [study(make, arguments.seed + number) for number in range(arguments.studies)])
        for name, make in NOISES.items()
    ]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    shown = [[each["noise"], *(format(each[key], form) for key, form in FORMATS.items())] for each in rows]
    headers = ["noise", "right", "loss", "p95", "told", "covered", "answers", "runs", "seconds"]
    print(tabulate.tabulate(shown, headers=headers, tablefmt="pipe", disable_numparse=True))


if __name__ == "__main__":
    main()
