"""How often the timing rules are wrong, on synthetic step times and on recorded ones.

    python benchmarks/timing_rules.py [--traces 2000] [--recorded FILE ...]

Prints tables. In the first two, for the search and for the verification, a row a kind of trace: `bias` is the reported
mean over the true one; `covered` how often the 95% interval holds the true mean; `steps` the median number timed.
`hopeless if equal` is the rate of wrong stops against a best that is as fast; `if 10% slower` and `30%` that of right
ones (long steps that agree need none: two of them are enough). Recorded traces are files of JSON lines with
`step_seconds` (warm-up included); each is cut into a reference, its second half, and resampled in blocks.

In the others the step is put together from the parts of short ones, a row a kind of trace of the micro-steps of a trial
with 64 micro-steps a step: `covered` is of the whole step's interval, `seconds` what was timed (median and 95th
percentile), and the last columns are how often a configuration is given up that takes so many times as long as the
best. Recorded traces of steps of one micro-step stand for micro-steps. A step's first micro-step takes twice as long
as the others, the closing one three times, with 5% of noise.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tabulate

from ds_tune.objectives.timing.intervals import mean_ci95, warmup_length
from ds_tune.objectives.timing.step_parts import StepParts
from ds_tune.objectives.timing.step_plan import PRECISE, StepPlan, is_hopeless

GAS = 64
"""Micro-steps of a step in the later tables."""
FIRST, CLOSING = 2.0, 3.0
"""Duration of its first and of its closing micro-step, in plain ones."""

Trace = Callable[[np.random.Generator, int], Sequence[float]]


def independent(noise: float) -> Trace:
    return lambda random, count: list(1 + noise * random.standard_normal(count))


def correlated(noise: float, rho: float) -> Trace:
    def trace(random: np.random.Generator, count: int) -> Sequence[float]:
        values = [random.standard_normal()]
        for _ in range(count - 1):
            values.append(rho * values[-1] + math.sqrt(1 - rho**2) * random.standard_normal())
        return [1 + noise * value for value in values]

    return trace


def warming(factors: Sequence[float]) -> Trace:
    def trace(random: np.random.Generator, count: int) -> Sequence[float]:
        steady = independent(0.01)(random, count)
        return [value * factor for value, factor in zip(steady, [*factors, *[1.0] * count], strict=False)]

    return trace


def outliers(rate: float, factor: float) -> Trace:
    """Most steps alike, some much longer: their mean is what training gets."""

    def trace(random: np.random.Generator, count: int) -> Sequence[float]:
        slow = random.random(count) < rate
        scale = 1 + rate * (factor - 1)
        return list((1 + 0.005 * random.standard_normal(count)) * np.where(slow, factor, 1.0) / scale)

    return trace


def recorded(path: Path) -> Trace:
    """Traces like a recorded one: its warm-up as it was, its steady steps resampled in blocks of five."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    runs = [line["step_seconds"] for line in lines if len(line.get("step_seconds", ())) >= 8]

    def trace(random: np.random.Generator, count: int) -> Sequence[float]:
        run = runs[int(random.integers(len(runs)))]
        steady = run[len(run) // 2 :]
        mean = statistics.fmean(steady)
        values = list(run[: len(run) // 4])
        while len(values) < count:
            start = int(random.integers(max(len(steady) - 5, 1)))
            values += steady[start : start + 5]
        return [value / mean for value in values]

    return trace


SYNTHETIC: dict[str, Trace] = {
    "independent, 0.5%": independent(0.005),
    "independent, 2%": independent(0.02),
    "correlated 0.6, 1%": correlated(0.01, 0.6),
    "correlated 0.8, 2%": correlated(0.02, 0.8),
    "warming 3 steps": warming([2.0, 1.5, 1.2]),
    "warming 6 steps": warming([1.6, 1.5, 1.4, 1.3, 1.2, 1.1]),
    "one step in 10 twice as long": outliers(0.1, 2.0),
}


def slow_start(micro_steps: int, factor: float, noise: float = 0.05) -> Trace:
    """The first micro-steps of the trial take longer, and all alike: nothing in them tells that it will end."""

    def trace(random: np.random.Generator, count: int) -> Sequence[float]:
        values = 1 + noise * random.standard_normal(count)
        values[:micro_steps] *= factor
        return list(values)

    return trace


def settling(factor: float, micro_steps: float) -> Trace:
    """Begins so many times slower and comes down exponentially."""

    def trace(random: np.random.Generator, count: int) -> Sequence[float]:
        excess = (factor - 1) * np.exp(-np.arange(count) / micro_steps)
        return list((1 + excess) * (1 + 0.05 * random.standard_normal(count)))

    return trace


def spike(number: int, factor: float) -> Trace:
    """One of the first micro-steps takes many times as long: kernels are loaded, or prefetching is set up."""

    def trace(random: np.random.Generator, count: int) -> Sequence[float]:
        values = 1 + 0.05 * random.standard_normal(count)
        values[number] *= factor
        return list(values)

    return trace


MICRO_STEPS: dict[str, Trace] = {
    "independent, 2%": independent(0.02),
    "independent, 20%": independent(0.2),
    "correlated 0.9, 10%": correlated(0.1, 0.9),
    "one in 10 three times as long": outliers(0.1, 3.0),
    "the first ten times as long": spike(0, 10.0),
    "the second eight times as long": spike(1, 8.0),
    "the third eight times as long": spike(2, 8.0),
    "settling from 3x within 5": settling(3.0, 5.0),
    "settling from 3x within 20": settling(3.0, 20.0),
    "the first 5 twice as long": slow_start(5, 2.0),
    "the first 8 three times as long": slow_start(8, 3.0),
    "the first step 1.4 times as long": slow_start(GAS, 1.4),
    "the first step twice as long": slow_start(GAS, 2.0),
}


def time_parts(
    trace: Sequence[float], zero_stage: int, micro_step_seconds: float, best: float | None, random: np.random.Generator
) -> tuple[StepParts, bool]:
    """The parts that a trial would time of a trace, after its unconditional warm-up, and whether it was stopped."""
    plan = StepPlan()
    behind = plan.warmup(zero_stage) * plan.warmup_micro_steps
    rest = iter(trace[behind:])
    steps: list[list[float]] = []
    parts: StepParts | None = None
    while count := plan.short_step(
        gradient_accumulation_steps=GAS,
        micro_step_seconds=micro_step_seconds * min(trace[behind - plan.warmup_micro_steps : behind]),
        parts=parts,
        best_step_seconds=best,
    ):
        step = [micro_step_seconds * next(rest) for _ in range(count)]
        step[0] *= FIRST * (1 + 0.05 * random.standard_normal())
        step[-1] *= CLOSING * (1 + 0.05 * random.standard_normal())
        steps.append(step)
        parts = StepParts.of(steps, GAS)
    assert parts is not None
    return parts, plan.is_hopeless(parts, best)


def parts_row(name: str, trace: Trace, traces: int, zero_stage: int, step_seconds: float) -> list[str]:
    errors, covered, seconds = [], 0, []
    stops = {1.0: 0, 1.1: 0, 1.3: 0, 2.0: 0, 4.0: 0}
    micro_step_seconds = step_seconds / (GAS - 2 + FIRST + CLOSING)
    for seed in range(traces):
        random = np.random.default_rng(seed)
        values = [float(value) for value in trace(random, 6 * GAS)]
        parts, _ = time_parts(values, zero_stage, micro_step_seconds, None, random)
        low, high = parts.ci95()
        errors.append(parts.step_seconds / step_seconds - 1)
        covered += low <= step_seconds <= high
        seconds.append(parts.timed_seconds)
        for slower in stops:
            stops[slower] += time_parts(values, zero_stage, micro_step_seconds, step_seconds / slower, random)[1]
    return [
        name,
        f"{step_seconds:g}",
        f"{statistics.fmean(errors):+.2%}",
        f"{np.percentile(np.abs(errors), 95):.2%}",
        f"{covered / traces:.1%}",
        f"{np.median(seconds):.1f} / {np.percentile(seconds, 95):.1f}",
        *(f"{count / traces:.1%}" for count in stops.values()),
    ]


def time_trial(trace: Sequence[float], plan: StepPlan, best: float | None) -> tuple[list[float], bool]:
    """The steps that a trial would time of a trace, after its unconditional warm-up, and whether it was stopped."""
    steps: list[float] = []
    rest = trace[plan.warmup(0) :]
    while count := plan.next_steps(steps, best):
        steps += rest[len(steps) : len(steps) + count]
    stopped = best is not None and is_hopeless(steps, best)
    return steps[warmup_length(steps) :], stopped


def row(name: str, trace: Trace, traces: int, step_seconds: float, plan: StepPlan) -> list[str]:
    # Seconds of a step decide how many the budget allows.
    means, covered, counts = [], 0, []
    stops = {1.0: 0, 1.1: 0, 1.3: 0}
    for seed in range(traces):
        values = [float(value) * step_seconds for value in trace(np.random.default_rng(seed), 60)]
        steps, _ = time_trial(values, plan, None)
        low, high = mean_ci95(steps)
        means.append(statistics.fmean(steps) / step_seconds)
        covered += low <= step_seconds <= high
        counts.append(len(steps))
        for slower in stops:
            stops[slower] += time_trial(values, plan, step_seconds / slower)[1]
    return [
        name,
        f"{step_seconds:g}",
        f"{statistics.fmean(means) - 1:+.2%}",
        f"{np.percentile(np.abs(np.array(means) - 1), 95):.2%}",
        f"{covered / traces:.1%}",
        f"{statistics.median(counts):g}",
        *(f"{count / traces:.1%}" for count in stops.values()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=int, default=2000)
    parser.add_argument("--recorded", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    kinds = SYNTHETIC | {path.name: recorded(path) for path in arguments.recorded}
    for title, plan in (("search", StepPlan()), ("verification", PRECISE)):
        rows = [
            row(name, trace, arguments.traces, seconds, plan)
            for name, trace in kinds.items()
            for seconds in (0.2, 1.5, 5.0)
        ]
        headers = [f"trace, {title}", "step s", "bias", "95% of errors", "covered", "steps", "hopeless if equal",
                   "10% slower", "30%"]  # fmt: skip
        print(f"{tabulate.tabulate(rows, headers=headers, tablefmt='pipe', disable_numparse=True)}\n")
    kinds = MICRO_STEPS | {path.name: recorded(path) for path in arguments.recorded}
    for title, stage in (("stages 0 to 2", 0), ("stage 3", 3)):
        rows = [
            parts_row(name, trace, arguments.traces, stage, seconds)
            for name, trace in kinds.items()
            for seconds in (12.0, 45.0)
        ]
        headers = [f"micro-steps, {title}", "step s", "bias", "95% of errors", "covered", "seconds",
                   "hopeless if equal", "10% slower", "30%", "2×", "4×"]  # fmt: skip
        print(f"\n{tabulate.tabulate(rows, headers=headers, tablefmt='pipe', disable_numparse=True)}")


if __name__ == "__main__":
    main()
