"""Requests to the tuner: what a person asks for, checked as far as it can be without a look at the machine.

A field's name is that of its option on the command line. Messages name fields in backticks, with a value if there is
one; the command line spells them as its options (`ds_tune.tuner.arguments.in_options`).
"""

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.metric import DEFAULT_METRIC, METRICS
from ds_tune.objectives.trial import KNOBS
from ds_tune.objectives.words import plain, shown
from ds_tune.objectives.workload.huggingface import DTYPES
from ds_tune.objectives.workload.script import MAPPED_KEYS
from ds_tune.storage.layout import DEFAULT_RESULTS
from ds_tune.tuner.dimensions import PRESETS
from ds_tune.tuner.limits import Limits

DEFAULT_STUDY = "ds-tune"
DEFAULT_TRIALS = 9
DEFAULT_TRIAL_SECONDS = 300.0
DEFAULT_SAMPLER = "cost-model"
SAMPLER_NAMES = (DEFAULT_SAMPLER, "tpe", "gp", "random", "grid")

LARGEST = 2**63
"""No whole number is as large: a database cannot hold it."""

MAX_TRIALS = 1_000_000
"""No study of whole trainings has more; a larger number is a slip of the finger, or more than a database can hold."""

MAX_RANKS = 1024
"""Each is a process of gigabytes on this machine."""

MAX_TRIAL_SECONDS = 10**9
"""Thirty years."""

NUMERICS = tuple(f"numerics:{field}" for field, knob in KNOBS.items() if knob.numerics is not None)
"""Names of what can be allowed."""

TRAINING_FIELDS = (
    "model", "dtype", "seq_len", "dataset", "text_column", "packing", "tokenizer", "pretrained", "ds_config",
    "gpus", "ranks", "memory_cap", "trial_timeout", "fresh_ranks", "hardware", "simulate",
)  # fmt: skip
"""Fields that say what is trained and on what: of use only where something is trained."""

NOT_SCRIPT = (
    "model",
    "dtype",
    "seq_len",
    "dataset",
    "text_column",
    "packing",
    "tokenizer",
    "pretrained",
    "ds_config",
    "hardware",
    "simulate",
    "replay",
)
"""Fields that a training script answers itself."""

NOT_SIMULATED = (
    "dataset", "text_column", "packing", "tokenizer", "pretrained", "gpus", "ranks", "trial_timeout", "fresh_ranks",
)  # fmt: skip
"""Fields that only mean something where ranks train."""

PATH_FIELDS = {"ds_config", "space", "results", "replay"}

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GiB|GB|MiB|MB|G|M)?", re.IGNORECASE)
_UNIT_BYTES = {"gib": 2**30, "g": 2**30, "gb": 10**9, "mib": 2**20, "m": 2**20, "mb": 10**6}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest:
    """Training, hardware and configurations that a request is for."""

    model: str | None = None
    """A shipped model, a folder or config.json, or a hub id; None, here as below, for the default on the device."""
    dtype: str | None = None
    seq_len: int | None = None
    dataset: str | None = None
    """Local files or a hub id; None for synthetic tokens."""
    text_column: str | None = None
    """Column of the dataset to train on; None to find out."""
    packing: bool | None = None
    """Cut the joined samples into blocks (as None does), instead of padding them."""
    tokenizer: str | None = None
    pretrained: bool = False
    ds_config: Path | None = None
    """A DeepSpeed configuration; trials keep all of it that is not searched."""
    preset: str | None = None
    space: Path | None = None
    """A TOML or YAML file with the space to search, instead of a preset."""
    allow: tuple[str, ...] = ()
    """Knobs to search although they change the numbers, as in `NUMERICS`."""
    max_micro_batch: int | None = None
    max_global_batch: int | None = None
    global_batch: int | None = None
    hardware: str | None = None
    """Imagined GPUs, such as 16xV100-32GB; None for this machine."""
    memory_cap: str | None = None
    """Most memory that a rank may have, such as 24GiB."""

    def __post_init__(self) -> None:
        """
        Raises:
            UsageError: a field has a value that it cannot have, or does not go with another.
        """
        if self.memory_cap is not None:
            parse_memory(self.memory_cap)
        check_types(self)
        for name in ("seq_len", "max_micro_batch", "max_global_batch", "global_batch"):
            check_count(name, getattr(self, name))
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("preset", self.preset, PRESETS)
        for word in self.allow:
            if word not in NUMERICS:
                raise UsageError(f"`allow={plain(word)}`: what can be allowed is {', '.join(NUMERICS)}")
        if self.max_global_batch is not None and self.global_batch is not None:
            raise UsageError("`global_batch` does not go with `max_global_batch`; leave out one")
        if self.space is not None and self.preset is not None:
            raise UsageError("`space` does not go with `preset`: the file can name one itself; leave out one")

    @property
    def allowed(self) -> frozenset[str]:
        """Fields of the knobs that change the numbers and may be searched all the same."""
        return frozenset(word.removeprefix("numerics:") for word in self.allow)

    @property
    def memory_cap_bytes(self) -> int | None:
        return None if self.memory_cap is None else parse_memory(self.memory_cap)

    def limits(self, ranks: int, *, max_micro_batch: int, max_global_batch: int) -> Limits:
        """Limits of the batch sizes on so many ranks, with bounds for where it has none of its own."""
        return Limits(
            ranks=ranks,
            max_micro_batch=self.max_micro_batch or max_micro_batch,
            max_global_batch=self.max_global_batch or max_global_batch,
            global_batch=self.global_batch,
        )

    def given(self, names: Sequence[str]) -> list[str]:
        """Returns the named fields that have another value than their default, in backticks."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        given = {name: value for name in names if (value := getattr(self, name)) != defaults[name]}
        return [f"`{name}=False`" if value is False else f"`{name}`" for name, value in given.items()]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest(SearchRequest):
    """Request to predict without running anything."""

    best: int = 6
    """Configurations to show."""

    def __post_init__(self) -> None:
        SearchRequest.__post_init__(self)
        check_count("best", self.best)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TuneRequest(SearchRequest):
    """Request for one run of the tuner."""

    trials: int = DEFAULT_TRIALS
    """Finished trials that the study is to have."""
    more: int | None = None
    """Trials to add to a study that has reached its total; None to begin one or to go on with it."""
    study: str = DEFAULT_STUDY
    storage: str | None = None
    """URL of the study's database; None for SQLite in the results folder."""
    results: Path = Path(DEFAULT_RESULTS)
    sampler: str = DEFAULT_SAMPLER
    seed: int = 0
    metric: str = DEFAULT_METRIC
    """Name of the metric that Optuna is told, one of `METRICS`."""
    gpus: int | None = None
    """Use the first so many visible GPUs; None for all, 0 for the CPU."""
    ranks: int | None = None
    """Ranks to start on the CPU."""
    trial_timeout: float | None = None
    """Seconds after which a trial is killed."""
    fresh_ranks: bool = False
    """Start new processes for every trial instead of keeping them."""
    verify: bool = True
    """Run the fastest trials and the baseline again in fresh processes."""
    replay: Path | None = None
    """A recorded surface that answers instead of training."""
    script: tuple[str, ...] = ()
    """The line that launches a training script of one's own, in place of a built-in model."""
    free_batch: bool = False
    """Let the global batch of the script, or of `ds_config`, change; it is held otherwise."""
    map: tuple[str, ...] = ()
    """Options of the script that follow a setting of DeepSpeed's, each as `key=option`; see `MAPPED_KEYS`."""
    simulate: bool = False
    """The cost model answers, for `hardware`, instead of training."""

    def __post_init__(self) -> None:
        SearchRequest.__post_init__(self)
        for name, count in (("trials", self.trials), ("more", self.more)):
            if count is not None and count > MAX_TRIALS:
                raise UsageError(f"`{name}` must be at most {MAX_TRIALS} (got {shown(count)})")
        for name in ("trials", "more", "ranks"):
            check_count(name, getattr(self, name))
        check_count("seed", self.seed, least=0)
        if self.ranks is not None and self.ranks > MAX_RANKS:
            raise UsageError(f"`ranks` must be at most {MAX_RANKS} (got {shown(self.ranks)})")
        if self.trial_timeout is not None and not 0 < self.trial_timeout <= MAX_TRIAL_SECONDS:
            raise UsageError(
                f"`trial_timeout` must be a number of seconds from above 0 to {MAX_TRIAL_SECONDS} "
                f"(got {shown(self.trial_timeout)})"
            )
        check_choice("sampler", self.sampler, SAMPLER_NAMES)
        check_choice("metric", self.metric, tuple(METRICS))
        if self.gpus is not None and not 0 <= self.gpus < LARGEST:
            raise UsageError(f"`gpus={shown(self.gpus)}`: a number of GPUs, or 0 for the CPU")
        if self.script:
            self._check_script()
        elif self.map:
            raise UsageError("`map` is about a training script; put its launch line behind --")
        elif self.free_batch and self.ds_config is None:
            raise UsageError(
                "`free_batch` is about a training script or `ds_config`; put the script's launch line behind --"
            )
        if self.free_batch and self.global_batch is not None:
            raise UsageError("`free_batch` does not go with `global_batch`; leave out one")
        if self.replay is not None:
            self._check_replay()
        elif self.simulate:
            self._check_simulate()
        elif self.hardware is not None:
            raise UsageError(
                "`hardware` imagines GPUs; add `simulate` to search on them, or use tune plan `hardware` to see what "
                "fits"
            )

    @property
    def mapped(self) -> dict[str, str]:
        """Options of the script by the keys of DeepSpeed's settings that they follow.

        Raises:
            UsageError: a key is none that an option can follow, or no option is named.
        """
        found = {}
        for word in self.map:
            key, _, option = word.partition("=")
            if key not in MAPPED_KEYS:
                raise UsageError(f"`map={word}`: write KEY=OPTION, with KEY one of {', '.join(MAPPED_KEYS)}")
            if not option.startswith("-"):
                raise UsageError(f"`map={word}`: {option or 'nothing'} is no option, which begins with a dash")
            found[key] = option
        return found

    @property
    def trial_seconds(self) -> float:
        return float(self.trial_timeout or DEFAULT_TRIAL_SECONDS)

    def _check_script(self) -> None:
        _ = self.mapped  # is checked
        if refused := self.given(NOT_SCRIPT):
            raise UsageError(f"{', '.join(refused)}: the training script behind -- says that itself; leave it out")

    def _check_replay(self) -> None:
        if refused := self.given(TRAINING_FIELDS):
            raise UsageError(
                f"`replay` does not go with {', '.join(refused)}: the recording says what was trained on what; "
                "leave out one or the other"
            )
        if self.space is not None:
            raise UsageError("`space` does not go with `replay`, whose space is what was recorded; leave out one")

    def _check_simulate(self) -> None:
        if refused := self.given(NOT_SIMULATED):
            raise UsageError(f"`simulate` does not go with {', '.join(refused)}: nothing is trained; leave out one")
        if self.hardware is None:
            raise UsageError("`simulate` needs to know on what: add `hardware`, such as `hardware=16xV100-32GB`")


def as_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as a request holds them: files and folders as Path, names as text, words to allow as a tuple.

    What cannot be brought into this form stays as it is, for the request to refuse.
    """
    fields = dict(values)
    for name, value in values.items():
        if name in PATH_FIELDS:
            if isinstance(value, str | os.PathLike) and value != "":
                fields[name] = Path(value)
        elif isinstance(value, os.PathLike):  # a model or a dataset, which may be a name on the hub as well
            fields[name] = os.fspath(value)
    for name in ("script", "map"):
        if isinstance(fields.get(name), list | tuple):
            fields[name] = tuple(fields[name])
    words = fields.get("allow")
    if isinstance(words, str | list | tuple | set | frozenset):
        fields["allow"] = (words,) if isinstance(words, str) else tuple(words)
    return fields


def request_of(values: Mapping[str, Any]) -> TuneRequest:
    """The request that a program's keywords make.

    Raises:
        UsageError: there is no such field, or one has a value that it cannot have.
    """
    known = [field.name for field in dataclasses.fields(TuneRequest)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"is `{near[0]}` meant?" if near else f"there are {', '.join(known)}"
            raise UsageError(f"there is no field `{plain(name)}`; {hint}")
    if values.get("more") is not None and "trials" in values:
        raise UsageError("`trials` does not go with `more`; leave out one")
    return TuneRequest(**as_fields(values))


_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    str: ((str,), "a text"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    bool: ((bool,), "True or False"),
    Path: ((Path,), "a path"),
    tuple[str, ...]: ((tuple,), "a list of texts"),
}
"""Types that a value may have, and words for them, by a field's declared type."""


def check_types(request: "SearchRequest") -> None:
    """
    Raises:
        UsageError: a field has a value of another type than it is declared with, or an empty one.
    """
    for name, declared in typing.get_type_hints(type(request)).items():
        value = getattr(request, name)
        allowed = typing.get_args(declared) if isinstance(declared, types.UnionType) else (declared,)
        if value is None and types.NoneType in allowed:
            continue
        [kind] = [each for each in allowed if each is not types.NoneType]
        kinds, words = _KINDS[kind]
        if isinstance(value, str) and not value.strip() and kind in (str, Path):
            raise UsageError(f"`{name}` is empty; give it a value, or leave it out")
        is_right = isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
        if not is_right or (isinstance(value, tuple) and not all(isinstance(each, str) for each in value)):
            raise UsageError(f"`{name}` must be {words} (got {shown(value)})")
        if isinstance(value, str) and not value.isprintable():
            raise UsageError(f"`{name}` has characters that cannot be printed (got {shown(value)})")


def check_count(name: str, value: Any, *, least: int = 1) -> None:
    """
    Raises:
        UsageError: the field has a value, and that is too small, or more than any can be.
    """
    if value is None:
        return
    if value < least:
        raise UsageError(f"`{name}` must be at least {least} (got {shown(value)})")
    if value >= LARGEST:
        raise UsageError(f"`{name}` must be less than 2^63 (got {shown(value)})")


def check_choice(name: str, value: str | None, choices: Sequence[str]) -> None:
    """
    Raises:
        UsageError: the field has a value that is none of the choices.
    """
    if value is not None and value not in choices:
        raise UsageError(f"`{name}={plain(value)}` is none of {', '.join(choices)}")


def parse_memory(text: str) -> int:
    """Bytes from `24GiB`, `24GB`, `512MiB` or a bare number of GiB.

    Raises:
        UsageError: it is none of these, less than a byte, or more than a number can be.
    """
    match = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    size = float(match[1]) * _UNIT_BYTES[(match[2] or "GiB").lower()] if match is not None else 0.0
    if size < 1 or not math.isfinite(size):
        raise UsageError(f"`memory_cap={plain(text)}`: write a size such as 24GiB or 512MiB")
    return int(size)
