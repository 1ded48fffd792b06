"""The file of a search space, in the user's own words, in TOML or YAML.

    preset = "core"                                  # what is not listed below: core or speed
    [search]
    zero_stage = [1, 2]
    micro_batch_size = {min = 4, max = 32, step = 4}
    compile = ["off", "blocks"]
    [fixed]
    activation_checkpointing = 1

with `constraints = ["micro_batch_size * gradient_accumulation_steps <= 64"]` above the first table. A file becomes the
list of its configurations, and the study's space is restricted to these.
"""

import dataclasses
import difflib
import math
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.knobs import KnobContext, Scalar, whole_number
from ds_tune.objectives.loss_scale import STAGE_0_LEFT_OUT
from ds_tune.objectives.trial import CORE_FIELDS, KNOBS, TrialConfig, has_meaning
from ds_tune.tuner.conditions import Condition
from ds_tune.tuner.dimensions import ZERO_STAGES, knob_choices, zero_stages
from ds_tune.tuner.limits import Limits
from ds_tune.tuner.space import BATCH_FIELDS, COARSE_MICRO_BATCHES

FIELDS = (*CORE_FIELDS, *KNOBS)
PRESETS_TO_EXTEND = ("core", "speed")
"""All combinations of what `full` has are millions."""

MAX_CONFIGURATIONS = 100_000
"""The search looks at each of them before every trial."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SpaceFile:
    """Contents of such a file, checked as far as the file alone allows."""

    path: Path
    preset: str
    values: Mapping[str, tuple[Scalar, ...]]
    """Values of each listed field, in the file's order."""
    conditions: tuple[Condition, ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """
        Raises:
            UsageError: there is no such file, or something in it is not to be understood.
        """
        document = _parse(path)
        for key in document:
            if key not in ("preset", "search", "fixed", "constraints"):
                raise _refusal(path, f"{_unknown(str(key), ('preset', 'search', 'fixed', 'constraints'))}")
        preset = document.get("preset", "core")
        if preset not in PRESETS_TO_EXTEND:
            raise _refusal(path, f"preset is {' or '.join(PRESETS_TO_EXTEND)}, not {preset!r}")
        values: dict[str, tuple[Scalar, ...]] = {}
        for table in ("search", "fixed"):
            entries = document.get(table, {})
            if not isinstance(entries, Mapping):
                raise _refusal(path, f"{table} is a table of fields, such as zero_stage = 1")
            for field, entry in entries.items():
                if field not in FIELDS:
                    raise _refusal(path, f"{table}: {_unknown(str(field), FIELDS)}")
                if field in values:
                    raise _refusal(path, f"{field} is under search and under fixed; leave out one")
                listed = _listed(path, field, entry) if table == "search" else [entry]
                values[field] = tuple(dict.fromkeys(_value(path, field, each) for each in listed))
        constraints = document.get("constraints", [])
        if not isinstance(constraints, list) or not all(isinstance(text, str) for text in constraints):
            raise _refusal(path, 'constraints is a list of conditions in quotes, such as ["micro_batch_size >= 4"]')
        try:
            conditions = tuple(Condition(text, (*FIELDS, "ranks", "global_batch_size")) for text in constraints)
        except ValueError as error:
            raise _refusal(path, f"constraints: {error}") from None
        return cls(path=path, preset=preset, values=values, conditions=conditions)

    def configurations(
        self, limits: Limits, context: KnobContext, allowed: Collection[str], own: TrialConfig | None = None
    ) -> tuple[TrialConfig, ...]:
        """All that it describes.

        Args:
            context: what decides which knobs have a meaning; where one has none it is off.
            allowed: knobs that may change the numbers.
            own: the configuration that a person trains with today.

        Raises:
            UsageError: none is left, they are too many, a knob has no meaning in any, or one would not train.
        """
        if 0 in self.values.get("zero_stage", ()) and not context.stage_0_trains:
            why = STAGE_0_LEFT_OUT.removesuffix(".")
            instead = "list zero_stage 1, 2 or 3, or train in bf16 (`dtype=bf16`) where the GPUs have it"
            raise _refusal(self.path, f"{why}; {instead}")
        for field in self.values:
            if field in KNOBS and KNOBS[field].numerics is not None and field not in allowed:
                raise _refusal(self.path, f"{field} changes the numbers of training: add `allow=numerics:{field}`")
        kinds: list[dict[str, Any]] = [{}]
        for field, choices in self._choices(context, allowed, own).items():
            kinds = [{**kind, field: value} for kind in kinds for value in _meaningful(kind, field, choices, context)]
            self._check_number(len(kinds))
        sizes = self._batch_sizes(limits)
        self._check_number(len(kinds) * len(sizes))
        every = [
            TrialConfig(**kind, micro_batch_size=size, gradient_accumulation_steps=accumulation)
            for kind in kinds
            for size, accumulation in sizes
        ]
        within = [config for config in every if limits.allow(config)]
        if not within:
            raise _refusal(self.path, self._beyond(limits))
        try:
            configs = tuple(config for config in within if self._holds(config, limits))
        except ValueError as error:
            raise _refusal(self.path, f"constraints: {error}") from None
        if not configs:
            raise _refusal(
                self.path,
                f"none of its {len(within)} configurations within the limits of the batch sizes keeps to its "
                "constraints; loosen one",
            )
        for field, listed in self.values.items():
            if field in KNOBS and not any(getattr(config, field) in listed for config in configs):
                raise _refusal(
                    self.path, f"{field} has no meaning in any configuration left on this machine (docs/knobs.md)"
                )
        return configs

    def _choices(
        self, context: KnobContext, allowed: Collection[str], own: TrialConfig | None
    ) -> dict[str, tuple[Scalar, ...]]:
        """Stage and knobs with their values, in the order of `TrialConfig`."""
        choices: dict[str, tuple[Scalar, ...]] = {"zero_stage": zero_stages(context)}
        choices |= knob_choices(self.preset, context, allowed, own)
        return {field: self.values.get(field, values) for field, values in choices.items()}

    def _batch_sizes(self, limits: Limits) -> list[tuple[int, int]]:
        """Pairs of mbs and gas within the limits; what is not listed follows from the global batch, or is coarse."""
        samples = (limits.global_batch or limits.max_global_batch) // limits.ranks
        powers = tuple(2**power for power in range(samples.bit_length()))
        sizes = [int(size) for size in self.values.get("micro_batch_size", COARSE_MICRO_BATCHES)]
        steps = [int(step) for step in self.values.get("gradient_accumulation_steps", powers)]
        if limits.global_batch is not None and "gradient_accumulation_steps" not in self.values:
            return [(size, samples // size) for size in sizes if samples % size == 0]
        return [(size, step) for size in sizes for step in steps if size * step <= samples]

    def _holds(self, config: TrialConfig, limits: Limits) -> bool:
        names = {field: getattr(config, field) for field in FIELDS}
        names |= {"ranks": limits.ranks, "global_batch_size": config.global_batch_size(limits.ranks)}
        return all(condition.holds(names) for condition in self.conditions)

    def _beyond(self, limits: Limits) -> str:
        """Which limit is in the way where none of its batch sizes keeps to them, and what would let one through."""
        if (total := limits.global_batch) is not None:
            sizes = [size for size, step in self._batch_sizes(limits) if size * step * limits.ranks == total]
            if not sizes:
                return (
                    f"no micro_batch_size × gradient_accumulation_steps of it makes `global_batch={total}` on "
                    f"{limits.ranks} ranks; list other values, or name another batch"
                )
            return (
                f"`global_batch={total}` takes a micro_batch_size of {min(sizes)} or more of it, and "
                f"`max_micro_batch` is {limits.max_micro_batch}; list smaller values, or add "
                f"`max_micro_batch={min(sizes)}`"
            )
        size, step = (min(map(int, self.values.get(field, (1,)))) for field in BATCH_FIELDS)
        samples = size * step * limits.ranks
        options = [f"`max_micro_batch={size}`"] if size > limits.max_micro_batch else []
        options += [f"`max_global_batch={samples}`"] if samples > limits.max_global_batch else []
        return (
            f"its smallest batch, micro_batch_size {size} and gradient_accumulation_steps {step} on {limits.ranks} "
            f"ranks, is beyond the limits; list smaller values, or add {' '.join(options)}"
        )

    def _check_number(self, count: int) -> None:
        if count > MAX_CONFIGURATIONS:
            raise _refusal(
                self.path, f"it describes more than {MAX_CONFIGURATIONS} configurations; list fewer values or fix some"
            )


def _meaningful(
    kind: Mapping[str, Any], field: str, choices: Sequence[Scalar], context: KnobContext
) -> Sequence[Scalar]:
    """Returns those of a field's values that have a meaning beside the others; off, where none has."""
    if field not in KNOBS:
        return choices
    knob = KNOBS[field]
    found = [value for value in choices if value == knob.off or has_meaning(field, {**kind, field: value}, context)]
    return found or [knob.off]


def _parse(path: Path) -> Mapping[str, Any]:
    """The document of a TOML or YAML file, by its suffix."""
    try:
        text = path.read_text()
    except OSError as error:
        raise UsageError(f"`space={path}`: {error.strerror}") from None
    except UnicodeDecodeError:
        raise _refusal(path, "it is not a text file") from None
    if path.suffix not in (".toml", ".yaml", ".yml"):
        raise _refusal(path, "name it .toml, .yaml or .yml, after what is in it")
    language = "TOML" if path.suffix == ".toml" else "YAML"
    try:
        document: Any = tomllib.loads(text) if language == "TOML" else yaml.safe_load(text)
    except yaml.reader.ReaderError:
        raise _refusal(path, "it is not a text file") from None
    except RecursionError:
        raise _refusal(path, f"not {language} for a space: it is nested too deeply") from None
    except Exception as error:  # PyYAML lets through what int, date and the like raise
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        said = " ".join(str(getattr(error, "problem", None) or error).split())
        if "int_max_str_digits" in said:  # Python reads no integer of more than 4,300 digits
            said = "a number in it has thousands of digits"
        raise _refusal(path, f"not {language}: {said}{where}") from None
    if not isinstance(document, Mapping) or not document:
        raise _refusal(path, "it says nothing; list fields under search or fixed")
    return document


def _listed(path: Path, field: str, entry: Any) -> list[Any]:
    """The values of an entry of `search`: a list, or a range of whole numbers."""
    if isinstance(entry, list):
        if not entry:
            raise _refusal(path, f"search.{field} is empty; list its values, or leave it out")
        return entry
    if not isinstance(entry, Mapping):
        raise _refusal(
            path, f"search.{field} is a list of values or a range {{min, max}}; one value belongs under fixed"
        )
    off = KNOBS[field].off if field in KNOBS else 0
    if not isinstance(off, int):
        raise _refusal(path, f"search.{field} has no range; list its values")
    numbers = {key: _whole(path, f"search.{field}.{key}", value) for key, value in entry.items()}
    if not {"min", "max"} <= set(numbers) <= {"min", "max", "step", "factor"} or {"step", "factor"} <= set(numbers):
        raise _refusal(path, f"search.{field} as a range has min, max and perhaps a step or a factor")
    low, high = numbers["min"], numbers["max"]
    if low > high:
        raise _refusal(path, f"search.{field}: min {low} is more than max {high}")
    if "factor" in numbers:
        factor = numbers["factor"]
        if factor < 2 or low < 1:
            raise _refusal(path, f"search.{field}: a factor is at least 2, from a min of at least 1")
        count = 1 + math.floor(math.log(high / low, factor) + 1e-9)
        return [low * factor**power for power in range(count)]
    step = numbers.get("step", 1)
    if step < 1:
        raise _refusal(path, f"search.{field}: a step is at least 1")
    if (high - low) // step >= MAX_CONFIGURATIONS:
        raise _refusal(path, f"search.{field} has more than {MAX_CONFIGURATIONS} values; give it a larger step")
    return list(range(low, high + 1, step))


def _value(path: Path, field: str, value: Any) -> Scalar:
    """One value of a field, checked."""
    if field in CORE_FIELDS:
        number = _whole(path, field, value)
        if field == "zero_stage" and number not in ZERO_STAGES:
            raise _refusal(path, f"zero_stage is 0, 1, 2 or 3, not {number}")
        if field != "zero_stage" and number < 1:
            raise _refusal(path, f"{field} is at least 1, not {number}")
        return number
    value = _number(value)
    if isinstance(value, bool) and not isinstance(KNOBS[field].off, int):
        value = {True: "on", False: "off"}[value]  # as YAML reads these words
    try:
        return KNOBS[field].checked(field, value)
    except ValueError as error:
        raise _refusal(path, str(error)) from None


_EXPONENT = re.compile(r"[+-]?\d[\d_]*\.?\d*[eE][+-]?\d+")


def _number(value: Any) -> Any:
    """Returns a value, but 5e8 as a number, which YAML takes for a word unless it is written 5.0e+8."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _whole(path: Path, name: str, value: Any) -> int:
    try:
        return whole_number(name, _number(value))
    except ValueError as error:
        raise _refusal(path, str(error)) from None


def _unknown(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"there is no {word}; " + (f"is {near[0]} meant?" if near else f"there are {', '.join(known)}")


def _refusal(path: Path, why: str) -> UsageError:
    """In one line, whatever line breaks the file's own words have."""
    return UsageError(f"`space={path}`: {' '.join(why.splitlines())}")
