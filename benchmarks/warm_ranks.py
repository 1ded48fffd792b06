"""Measures what warm ranks cost, leave behind and get wrong, on the machine it runs on.

    python benchmarks/warm_ranks.py --out warm.jsonl [--gpus N] [--part overhead|fresh|memory ...]

Parts: `overhead`, a warm trial's wall time less its steps (`memory`'s trials count as well); `fresh`, the figures of
warm ranks against fresh processes, in both orders; `memory`, what is left on any rank after 30 mixed trials. Each trial
is a JSON line in the file, written at once; what is there already is not run again, so that a run can be cut off and go
on. The table is printed last.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tabulate

from ds_tune.objectives.machine import GIB, Machine, detect_machine
from ds_tune.objectives.running.deepspeed_objective import DeepSpeedObjective
from ds_tune.objectives.running.local_launcher import LocalLauncher
from ds_tune.objectives.timing.intervals import mean_ci95
from ds_tune.objectives.timing.step_plan import PRECISE, StepPlan
from ds_tune.objectives.trial import Failure, Measurement, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.tuner.backend import DEFAULTS

PARTS = ("overhead", "fresh", "memory")

# (stage, mbs, gas) by device: small and large, every stage. A GPU of 80 GB has room for all of them.
CONFIGS = {
    "cuda": [(0, 4, 1), (1, 8, 1), (2, 8, 2), (3, 8, 2), (1, 8, 4), (0, 8, 4)],
    "cpu": [(0, 2, 1), (1, 4, 1), (2, 2, 2), (3, 2, 1), (1, 8, 2), (0, 1, 1)],
}


class Recorder:
    """The file of results: appends each at once, and knows those of an earlier run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def has(self, **key: Any) -> bool:
        return any(key.items() <= row.items() for row in self.rows)

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({key: value for key, value in row.items() if key != "step_seconds"}), flush=True)


class Bench:
    """Runs trials of one workload and records them."""

    def __init__(self, machine: Machine, launcher: LocalLauncher, recorder: Recorder, plan: StepPlan) -> None:
        self._plan = plan
        self._launcher = launcher
        defaults = DEFAULTS[machine.device]
        self._workload = HuggingFaceWorkload(model=defaults.model, seq_len=defaults.seq_len, dtype=defaults.dtype)
        self._machine = machine
        self._folder = Path(tempfile.mkdtemp(prefix="warm-ranks-"))
        self.recorder = recorder
        self.configs = [
            TrialConfig(zero_stage=stage, micro_batch_size=size, gradient_accumulation_steps=accumulation)
            for stage, size, accumulation in CONFIGS[machine.device]
        ]

    def objective(self, *, fresh: bool) -> DeepSpeedObjective:
        return DeepSpeedObjective(
            self._workload,
            self._machine,
            launcher=self._launcher,
            log_folder=self._folder / "start",
            trial_seconds=300,
            plan=self._plan,
            fresh_ranks=fresh,
            notice=lambda text: print(text, file=sys.stderr, flush=True),
        )

    def trial(self, objective: DeepSpeedObjective, config: TrialConfig, **key: Any) -> None:
        folder = self._folder / config.name
        folder.mkdir(exist_ok=True)
        started, cpu = time.monotonic(), _cpu_seconds()
        outcome = objective.run(config, folder, lambda phase: None)
        wall = time.monotonic() - started
        row: dict[str, Any] = {**key, "name": config.name, "stage": config.zero_stage, "wall_s": round(wall, 3)}
        row["parent_cpu"] = round((_cpu_seconds() - cpu) / wall, 5)
        match outcome:
            case Measurement():
                steps = sum(outcome.step_seconds) + sum(outcome.warmup_step_seconds)
                row |= {"samples_per_s": outcome.samples_per_second, "overhead_s": round(wall - steps, 3)}
                row["step_seconds"] = [*outcome.warmup_step_seconds, *outcome.step_seconds]
                row["warmup_steps"] = len(outcome.warmup_step_seconds)
            case Failure():
                row |= {"failure": outcome.kind.value, "message": outcome.message}
        if objective.left_bytes is not None:
            row["left_gib"] = {kind: round(left / GIB, 4) for kind, left in objective.left_bytes.items()}
        self.recorder.add(**row)

    def overhead(self) -> None:
        """Three warm trials of each configuration, after one that is not counted."""
        self._warm("overhead", [config for _ in range(3) for config in self.configs])

    def memory(self) -> None:
        """Thirty mixed trials in one group."""
        self._warm("memory", list(itertools.islice(itertools.cycle(self.configs), 30)))

    def _warm(self, part: str, configs: list[TrialConfig]) -> None:
        if self.recorder.has(part=part, number=len(configs) - 1):
            return
        objective = self.objective(fresh=False)
        try:
            objective.prepare()
            for number, config in enumerate([configs[0], *configs], start=-1):
                self.trial(objective, config, part=part, number=number)
        finally:
            objective.close()

    def fresh(self) -> None:
        """Each configuration warm and in fresh processes, one right after the other, in both orders."""
        orders = (("warm", "fresh"), ("fresh", "warm"))
        trials = [
            (config, {"part": "fresh", "turn": turn, "mode": mode})
            for turn, config in itertools.product(range(2), self.configs)
            for mode in orders[turn]
        ]
        missing = [(config, key) for config, key in trials if not self.recorder.has(**key, name=config.name)]
        if not missing:
            return
        with (
            contextlib.closing(self.objective(fresh=False)) as warm,
            contextlib.closing(self.objective(fresh=True)) as fresh,
        ):
            self.trial(warm, self.configs[0], part="fresh", turn=-1, mode="warm")  # only then it is warm
            for config, key in missing:
                self.trial(warm if key["mode"] == "warm" else fresh, config, **key)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def table(rows: list[dict[str, Any]]) -> str:
    """The targets' table, as far as there are figures."""
    lines: list[list[str]] = []
    counted = [row for row in rows if row.get("number", -1) >= 0 and "overhead_s" in row]
    for title, stages in (("stages 0-2", (0, 1, 2)), ("stage 3", (3,))):
        seconds = [row["overhead_s"] for row in counted if row["stage"] in stages]
        if seconds:
            lines.append([f"overhead of a warm trial, {title}, median", f"{statistics.median(seconds):.2f} s"])
    lines += _fresh_lines([row for row in rows if row["part"] == "fresh" and "samples_per_s" in row])
    mixed = [row for row in rows if row["part"] == "memory" and "left_gib" in row]
    if mixed:
        for kind, left in mixed[-1]["left_gib"].items():
            lines.append([f"left after {len(mixed) - 1} more trials than the first, {kind}", f"{left:.3f} GiB"])
    shares = [row["parent_cpu"] for row in rows if row["part"] != "fresh" and row.get("number", -1) >= 0]
    if shares:
        lines.append(["the tuner's own CPU, of a core", f"{statistics.fmean(shares):.2%}"])
    return tabulate.tabulate(lines, headers=["what", "figure"], tablefmt="pipe", disable_numparse=True)


def _fresh_lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Warm against fresh, and for scale what two runs in one way differ by."""
    rates = {(row["turn"], row["mode"], row["name"]): row["samples_per_s"] for row in rows if row["turn"] >= 0}
    ratios: dict[str, list[float]] = {}
    for (turn, mode, name), rate in rates.items():
        if mode == "warm" and (turn, "fresh", name) in rates:
            ratios.setdefault(name, []).append(rate / rates[turn, "fresh", name])
    if not ratios:
        return []
    apart = [
        abs(rate / rates[0, mode, name] - 1)
        for (turn, mode, name), rate in rates.items()
        if turn == 1 and (0, mode, name) in rates
    ]
    every = [ratio for pair in ratios.values() for ratio in pair]
    low, high = mean_ci95(every, independent=True) if len(every) > 1 else (math.nan, math.nan)
    mean = f"{statistics.fmean(every):.4f} ({low:.4f}–{high:.4f}, {len(every)} pairs)"
    lines = [["warm over fresh, mean of the ratios", mean]]
    lines += [[f"warm over fresh, {name}", f"{statistics.fmean(pair):.4f}"] for name, pair in ratios.items()]
    if apart:
        lines.append(["two runs in one way differ by, median", f"{statistics.median(apart):.2%}"])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--timed-seconds", type=float, default=PRECISE.timed_seconds, help="of each trial")
    arguments = parser.parse_args()
    machine = detect_machine(gpus=arguments.gpus, cpu_ranks=2, memory_cap_bytes=None)
    plan = dataclasses.replace(PRECISE, timed_seconds=arguments.timed_seconds)
    print(machine.description, flush=True)
    with LocalLauncher(machine) as launcher:
        bench = Bench(machine, launcher, Recorder(arguments.out), plan)
        for part in arguments.part:
            getattr(bench, part)()
    print(table(bench.recorder.rows))


if __name__ == "__main__":
    main()
