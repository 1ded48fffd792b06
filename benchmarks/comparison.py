"""Decisions of head_to_head.py, none of which runs anything: who is next, how fast each is, what is resumed."""

import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tabulate

from ds_tune.objectives.ds_document import knobs_of
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.files import write_atomically
from ds_tune.objectives.machine import GIB
from ds_tune.objectives.timing.intervals import mean_ci95, speedup_ci95
from ds_tune.objectives.trial import Measurement, TrialConfig, outcome_from_json
from ds_tune.storage.finalists import RUN_NOISE

AUTOTUNER = "deepspeed"
TRIAL_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "autotuning")

DEEPSPEED_BUCKETS = {"reduce_bucket_size": 500_000_000, "allgather_bucket_size": 500_000_000}
"""DeepSpeed's defaults. ds-tune writes smaller ones on a CPU unless a configuration says otherwise."""

RESERVE = 1.3
FIRST_RUN_SECONDS = 90.0
"""Seconds assumed for a run in fresh processes before there has been one: 40 s were seen for GPT2-xl on one H200."""


def trial_of(ds_config: Mapping[str, Any], device: str) -> tuple[TrialConfig, dict[str, Any]]:
    """A complete DeepSpeed configuration as a trial, and the settings that go below it so that nothing is lost.

    `deepspeed_config` lays the one over the other and has the same configuration again; on a CPU DeepSpeed's default
    bucket sizes are then spelled out.
    """
    zero = {key: value for key, value in ds_config.get("zero_optimization", {}).items() if key != "stage"}
    if device == "cpu":
        zero = {**DEEPSPEED_BUCKETS, **zero}
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    config = TrialConfig.from_json(
        {
            "zero_stage": stage,
            "micro_batch_size": ds_config["train_micro_batch_size_per_gpu"],
            "gradient_accumulation_steps": ds_config.get("gradient_accumulation_steps", 1),
            **knobs_of(ds_config, zero_stage=stage),
        }
    )
    base = {key: value for key, value in ds_config.items() if key not in TRIAL_KEYS}
    return config, {**base, "zero_optimization": zero}


def order(names: Sequence[str], turn: int) -> list[str]:
    """Order of a round: turned in every other, so that a drift of the machine favours none."""
    return list(names[::-1] if turn % 2 else names)


def next_run(names: Sequence[str], runs: Sequence[Mapping[str, Any]], rounds: int) -> tuple[int, str] | None:
    """The round and the contestant to run next; None when all rounds are done."""
    done = {(run["round"], run["contestant"]) for run in runs}
    turns = ((turn, name) for turn in range(rounds) for name in order(names, turn))
    return next((turn for turn in turns if turn not in done), None)


def run_seconds(runs: Sequence[Mapping[str, Any]]) -> float:
    """Seconds that the next run may need, judged by the longest so far."""
    return RESERVE * max((run["wall_seconds"] for run in runs), default=FIRST_RUN_SECONDS / RESERVE)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Rate of one winner over all its runs."""

    samples_per_second: float
    samples_per_second_ci95: tuple[float, float]
    runs: int
    peak_memory_bytes: int
    """The highest of any rank in any run."""

    def over(self, base: "Rate") -> tuple[float, tuple[float, float]]:
        """Speed-up over another, with a 95% interval."""
        return speedup_ci95(
            self.samples_per_second,
            self.samples_per_second_ci95,
            base.samples_per_second,
            base.samples_per_second_ci95,
        )


def rate_of(name: str, runs: Sequence[Mapping[str, Any]]) -> Rate | None:
    """The geometric mean of a contestant's runs; None without any that gave a measurement.

    The interval is the wider of two: by Student's t from how far the runs lie apart, and from what their own steps and
    the noise that ds-tune's verification assumes between runs leave open, for a few runs may agree by chance. Unlike
    there, the search's own figure is no part of it: the autotuner has none that would compare.
    """
    outcomes = [outcome_from_json(run["outcome"]) for run in runs if run["contestant"] == name]
    measured = [outcome for outcome in outcomes if isinstance(outcome, Measurement)]
    if not measured:
        return None
    logs = [math.log(run.samples_per_second) for run in measured]
    mean = statistics.fmean(logs)
    widths = [run.samples_per_second_ci95[1] - run.samples_per_second_ci95[0] for run in measured]
    within = [
        (width / run.samples_per_second / 2 / 1.96) ** 2 for width, run in zip(widths, measured, strict=True)
    ]  # fmt: skip
    half = 1.96 * math.sqrt((RUN_NOISE**2 + statistics.fmean(within)) / len(logs))
    if len(logs) > 1:
        half = max(half, mean_ci95(logs)[1] - mean)
    return Rate(
        samples_per_second=math.exp(mean),
        samples_per_second_ci95=(math.exp(mean - half), math.exp(mean + half)),
        runs=len(logs),
        peak_memory_bytes=max(run.peak_memory_bytes for run in measured),
    )


HEADERS = (
    "contestant", "winner", "samples/s", "over the autotuner's", "runs", "tuning s", "trials", "OOM", "GiB a rank",
    "global batch",
)  # fmt: skip


def table(contestants: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> str:
    """The comparison, as far as there are figures; `tuning s` has the number of calls if there was more than one."""
    base = rate_of(AUTOTUNER, runs)
    lines = []
    for each in contestants:
        rate = rate_of(each["name"], runs)
        tried = sum(run["contestant"] == each["name"] for run in runs)
        calls = f" ({each['calls']} calls)" if each["calls"] > 1 else ""
        winner = each["winner"] or {}
        lines.append(
            [
                each["name"],
                winner.get("name") or "–",
                _with_interval(rate.samples_per_second, rate.samples_per_second_ci95) if rate else "–",
                _over(each["name"], rate, base),
                f"{rate.runs if rate else 0} of {tried}",
                f"{each['tuning_seconds']:.0f}{calls}" + ("" if each["done"] else ", unfinished"),
                each["trials"],
                each["out_of_memory"],
                f"{rate.peak_memory_bytes / GIB:.2f}" if rate else "–",
                winner.get("global_batch", "–"),
            ]
        )
    return tabulate.tabulate(lines, headers=HEADERS, tablefmt="pipe", disable_numparse=True)


def _over(name: str, rate: Rate | None, base: Rate | None) -> str:
    if rate is None or base is None:
        return "–"
    return "1" if name == AUTOTUNER else _with_interval(*rate.over(base))


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.2f} ({interval[0]:.2f}–{interval[1]:.2f})"


class Sessions:
    """Seconds that a contestant has tuned, call by call, in a file that is whole at any moment."""

    def __init__(self, path: Path) -> None:
        self._path = path
        document: dict[str, Any] = {"sessions": [], "done": False}
        if path.exists():
            document = json.loads(path.read_text())
        self.all: list[dict[str, Any]] = document["sessions"]
        self.done: bool = document["done"]

    @property
    def is_open(self) -> bool:
        """True where the last session never said its end: this script was killed."""
        return bool(self.all) and self.all[-1]["ended"] is None

    def begin(self, command: Sequence[str]) -> None:
        times = {"began": time.time(), "ended": None, "seconds": 0.0, "lost_seconds": 0.0}
        self.all.append({"command": list(command), **times, "how": None})
        self._write()

    def end(self, how: str, ended: float, *, lost_seconds: float = 0.0) -> None:
        """Closes the session that is open.

        Args:
            lost_seconds: what of it is not to be counted.
        """
        session = self.all[-1]
        session["ended"] = ended
        session["seconds"] = round(session["ended"] - session["began"], 3)
        session["how"], session["lost_seconds"] = how, round(lost_seconds, 3)
        self._write()

    def finish(self) -> None:
        """There is nothing left to tune."""
        self.done = True
        self._write()

    @property
    def seconds(self) -> float:
        """Seconds that count, over all calls."""
        return math.fsum(session["seconds"] - session["lost_seconds"] for session in self.all)

    def _write(self) -> None:
        write_atomically(self._path, json.dumps({"sessions": self.all, "done": self.done}, indent=2))


def last_written(folder: Path, began: float) -> float:
    """When the youngest file below a folder was written: the end of a session that did not say it."""
    times = [path.stat().st_mtime for path in folder.rglob("*") if path.is_file()]
    return max([began, *times])


class Runs:
    """The verification's runs, a line each, appended as they end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.all: list[dict[str, Any]] = []
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # what was killed while it wrote did not end its line
        self.all = [json.loads(line) for line in whole.splitlines()]
        if whole != text:
            write_atomically(path, whole)

    def add(self, **run: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(run) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.all.append(run)


def claim(path: Path, asked: Mapping[str, Any]) -> None:
    """Makes a folder this comparison's.

    Raises:
        UsageError: it is another's; the text names what differs.
    """
    if not path.exists():
        write_atomically(path, json.dumps(asked, indent=2))
        return
    there = json.loads(path.read_text())
    wanted = json.loads(json.dumps(asked))
    differing = [
        f"{key} {there.get(key)} there, {wanted.get(key)} here"
        for key in sorted({*there, *wanted})
        if there.get(key) != wanted.get(key)
    ]
    if differing:
        raise UsageError(f"--out {path.parent} holds another comparison ({'; '.join(differing)}); name another folder")
