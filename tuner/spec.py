"""StudySpec: what one run of the tuner was asked for, checked."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.machine import Machine
from ds_tune.objectives.metric import DEFAULT_METRIC
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.kinds import Workload
from ds_tune.storage.layout import ResultsFolder
from ds_tune.tuner.space import Limits

DEFAULT_STUDY = "ds-tune"
DEFAULT_TRIALS = 9
DEFAULT_TRIAL_SECONDS = 300.0
DEFAULT_SAMPLER = "cost-model"
SAMPLER_NAMES = (DEFAULT_SAMPLER, "tpe", "gp", "random", "grid")

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GiB|GB|MiB|MB|G|M)?", re.IGNORECASE)
_UNIT_BYTES = {"gib": 2**30, "g": 2**30, "gb": 10**9, "mib": 2**20, "m": 2**20, "mb": 10**6}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What differs between a run on GPUs and the same command on a CPU."""

    model: str
    dtype: str
    seq_len: int
    max_micro_batch: int
    max_samples_per_rank: int
    """Bounds the global batch, and with it the seconds of one step."""


DEFAULTS = {
    "cuda": Defaults(model="gpt2-xl", dtype="fp16", seq_len=1024, max_micro_batch=64, max_samples_per_rank=128),
    "cpu": Defaults(model="gpt2-nano", dtype="fp32", seq_len=128, max_micro_batch=16, max_samples_per_rank=32),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StudySpec:
    """Everything that decides what a run of the tuner does."""

    study: str
    storage_url: str
    results: ResultsFolder
    workload: Workload
    machine: Machine
    limits: Limits
    trials: int
    more: int | None
    """Trials to add to a study that has reached its total; None for the plain command."""
    seed: int
    trial_seconds: float
    preset: str = "core"
    allowed: frozenset[str] = frozenset()
    """Knobs that change the numbers and may be searched all the same."""
    sampler: str = DEFAULT_SAMPLER
    """One of `tuner.sampler`'s, by name."""
    metric: str = DEFAULT_METRIC
    """Name of the metric that Optuna is told, one of `METRICS`."""
    verify: bool = True
    """Run the finalists again in fresh processes."""
    restricted_to: Sequence[TrialConfig] | None = None
    """The only configurations that can be answered; None for all within the limits."""
    recording: str | None = None
    """Which recording answers, where one does."""
    versions: Mapping[str, str] | None = None
    """The software that the figures are of, where it is not what is installed here."""


def parse_memory(text: str) -> int:
    """Bytes from `24GiB`, `24GB`, `512MiB` or a bare number of GiB.

    Raises:
        UsageError: it is none of these, less than a byte, or more than a number can be.
    """
    match = _SIZE.fullmatch(text.strip())
    size = float(match[1]) * _UNIT_BYTES[(match[2] or "GiB").lower()] if match is not None else 0.0
    if size < 1 or not math.isfinite(size):
        raise UsageError(f"--memory-cap {text}: write a size such as 24GiB or 512MiB")
    return int(size)


def results_folder(path: Path, *, option: str = "--results") -> ResultsFolder:
    """The folder for results, checked before anything runs.

    Args:
        option: which one named it.

    Raises:
        UsageError: it is a file or cannot be written to, or something in it is in the way.
    """
    folder = ResultsFolder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be written to ({error.strerror}); name another folder") from error
    in_the_way = folder.in_the_way()
    if in_the_way is not None:
        kind = "a folder" if in_the_way.is_dir() else "no folder"
        raise UsageError(f"{option} {path} cannot be used: {in_the_way} is {kind}; move it away or name another folder")
    return folder
