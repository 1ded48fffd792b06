"""Search space: the legal configurations that the dimensions of a study span."""

import functools
import hashlib
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution

from ds_tune.objectives.cost_model.knob_context import knob_context_of
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.knobs import KnobContext
from ds_tune.objectives.machine import Machine
from ds_tune.objectives.trial import KNOBS, TrialConfig, has_meaning
from ds_tune.objectives.workload.kinds import Workload
from ds_tune.tuner.dimensions import DIMENSIONS, Dimension, dimensions_of, largest_micro_batch, values_of, zero_stages
from ds_tune.tuner.limits import Limits

BATCH_FIELDS = ("micro_batch_size", "gradient_accumulation_steps")
"""The two knobs whose product is bounded; what one may be depends on the other."""


COARSE_MICRO_BATCHES = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128)
"""Beside other knobs, every step of a batch size would make more points than anybody can tell apart."""

SPARSE_MICRO_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Beside very many of them."""

MANY_KNOBS = 6

EVERY_SIZE_TO = 128
MICRO_BATCH_STEP, ACCUMULATION_STEP = 1.05, 1.25
"""Above that many, batch sizes that are so much apart: nobody could tell those between them from each other."""

MAX_UNUSUAL_KNOBS = 1
"""Number of knobs that may at once have a value that is not in the preset `speed`: what they bring hardly depends on
each other, and all of their combinations would be millions."""


def _thinned(largest: int, step: float) -> list[int]:
    """Every size up to `EVERY_SIZE_TO`, then each the step larger than the one before, and the largest."""
    sizes = list(range(1, min(largest, EVERY_SIZE_TO) + 1))
    while sizes[-1] < largest:
        sizes.append(min(math.ceil(sizes[-1] * step), largest))
    return sizes


class Space:
    """The configurations of one study: all combinations of the dimensions that keep to the limits, or only some."""

    def __init__(
        self,
        limits: Limits,
        dimensions: Sequence[Dimension] = DIMENSIONS,
        *,
        context: KnobContext | None = None,
        restricted_to: Sequence[TrialConfig] | None = None,
        own: TrialConfig | None = None,
        with_untuned: bool = False,
    ) -> None:
        """
        Args:
            with_untuned: the untuned configuration is to run beside a person's own.
            context: what decides, besides the configuration, which knobs have a meaning.
            restricted_to: where given, nothing else is ever proposed; of these, what keeps to the limits.
            own: the configuration that a person trains with today: the first of the baselines.

        Raises:
            UsageError: no configuration is left.
        """
        limits.check()
        self.limits, self.own, self._with_untuned = limits, own, with_untuned
        self.context = context or KnobContext(ranks=limits.ranks)
        self.restricted_to = (
            None if restricted_to is None else tuple(config for config in restricted_to if limits.allow(config))
        )
        if self.restricted_to == ():
            raise UsageError(
                f"none of the {len(restricted_to or ())} configurations that may be tried keeps to the limits of the "
                "batch sizes; change `max_micro_batch`, `max_global_batch` or `global_batch`"
            )
        self.dimensions: tuple[Dimension, ...] = ()
        self.distributions: dict[str, BaseDistribution] = {}
        for dimension in dimensions:
            distribution = (
                dimension.distribution(limits)
                if self.restricted_to is None
                else dimension.among(limits, self.restricted_to)
            )
            if dimension.off is None or list(values_of(dimension.field, distribution)) != [dimension.off]:
                self.dimensions += (dimension,)
                self.distributions[dimension.field] = distribution

    @functools.cached_property
    def legal(self) -> tuple[TrialConfig, ...]:
        """Every configuration that may be proposed, the batch sizes ascending within each ZeRO stage."""
        if self.restricted_to is not None:
            return tuple(
                sorted(dict.fromkeys(self.restricted_to), key=lambda config: (self._kind(config), self._sizes(config)))
            )
        others = [dimension.field for dimension in self.dimensions if dimension.field not in BATCH_FIELDS]
        kinds = self._kinds(others)
        return tuple(
            TrialConfig(**kind, micro_batch_size=micro_batch_size, gradient_accumulation_steps=accumulation)
            for kind in kinds
            for micro_batch_size, accumulation in self._batch_sizes()
        )

    def _kinds(self, fields: Sequence[str]) -> list[dict[str, Any]]:
        """Every combination of these fields that has a meaning, built field by field: their product may be huge."""
        kinds: list[dict[str, Any]] = [{}]
        for field in fields:
            values = values_of(field, self.distributions[field])
            kinds = [{**kind, field: value} for kind in kinds for value in values]
            kinds = [kind for kind in kinds if self._has_meaning(kind)]
        return kinds

    def _has_meaning(self, kind: Mapping[str, Any]) -> bool:
        """Whether every knob that is on does something, so that no two configurations are the same."""
        on = {field: kind[field] for field in KNOBS if field in kind and kind[field] != KNOBS[field].off}
        knobs = {field: KNOBS[field] for field in on if KNOBS[field].numerics is None}
        unusual = sum(
            on[field] not in (*knob.usual(self.context), getattr(self.own, field, knob.off))
            for field, knob in knobs.items()
        )
        return unusual <= MAX_UNUSUAL_KNOBS and all(has_meaning(field, kind, self.context) for field in on)

    def _kind(self, config: TrialConfig) -> tuple[Any, ...]:
        """All of a configuration but its batch sizes."""
        fields = [dimension.field for dimension in self.dimensions if dimension.field not in BATCH_FIELDS]
        return tuple(getattr(config, field) for field in fields)

    def _sizes(self, config: TrialConfig) -> tuple[int, ...]:
        return tuple(getattr(config, field) for field in BATCH_FIELDS)

    def _batch_sizes(self) -> Iterator[tuple[int, int]]:
        """Every (micro_batch_size, gradient_accumulation_steps) within the limits."""
        limits = self.limits
        largest = largest_micro_batch(limits)
        if limits.global_batch is not None:
            samples = limits.global_batch // limits.ranks
            yield from ((size, samples // size) for size in range(1, largest + 1) if samples % size == 0)
            return
        knobs = sum(dimension.off is not None for dimension in self.dimensions)
        listed = SPARSE_MICRO_BATCHES if knobs >= MANY_KNOBS else COARSE_MICRO_BATCHES
        sizes = [size for size in listed if size <= largest] if knobs else _thinned(largest, MICRO_BATCH_STEP)
        for micro_batch_size in sizes:
            most = limits.max_global_batch // (limits.ranks * micro_batch_size)
            if not knobs:
                accumulations = _thinned(most, ACCUMULATION_STEP)
            else:
                powers = range(0, most.bit_length(), 2 if knobs >= MANY_KNOBS else 1)
                # The most there may be, too: that is where an optimizer step, or a reduction, is paid for least often.
                accumulations = sorted({*(2**power for power in powers), most})
            yield from ((micro_batch_size, accumulation) for accumulation in accumulations)

    @functools.cached_property
    def baselines(self) -> tuple[TrialConfig, ...]:
        """The untuned configuration, then what to fall back on where it does not fit: mbs 1 under more partitioning,
        then with the most of what the space has to save memory.

        Where only some may be tried: the smallest of each ZeRO stage, what costs speed to save memory last. The
        person's own comes first where there is one.
        """
        if self.own is not None:
            smallest = [next(group) for _, group in itertools.groupby(self.legal, key=self._kind)]
            second = [] if self.untuned is None else [self.untuned]
            return tuple(dict.fromkeys([self.own, *second, *sorted(smallest, key=lambda config: -config.zero_stage)]))
        if self.restricted_to is not None:
            smallest = [next(group) for _, group in itertools.groupby(self.legal, key=self._kind)]
            return tuple(sorted(smallest, key=lambda config: (self._knobs_on(config), config.zero_stage)))
        accumulation = self.limits.global_batch // self.limits.ranks if self.limits.global_batch is not None else 1
        untuned = tuple(
            TrialConfig(zero_stage=stage, micro_batch_size=1, gradient_accumulation_steps=accumulation)
            for stage in zero_stages(self.context)
        )
        return (*untuned, *self._most_saving())

    @property
    def untuned(self) -> TrialConfig | None:
        """The untuned configuration that runs beside a person's own; None where that is it, or none is to."""
        if self.own is None or not self._with_untuned or self.restricted_to is not None:
            return None
        accumulation = (self.limits.global_batch or self.limits.ranks) // self.limits.ranks
        stage = zero_stages(self.context)[0]
        untuned = TrialConfig(zero_stage=stage, micro_batch_size=1, gradient_accumulation_steps=accumulation)
        return None if untuned == self.own else untuned

    def _most_saving(self) -> tuple[TrialConfig, ...]:
        """The smallest configurations with as many memory-saving knobs as any has, and no others."""
        saving = {field: knob.saving for field, knob in KNOBS.items() if knob.saving is not None}
        smallest = [next(group) for _, group in itertools.groupby(self.legal, key=self._kind)]
        savers = [config for config in smallest if config.knobs_on and config.knobs_on.items() <= saving.items()]
        most = max((len(config.knobs_on) for config in savers), default=0)
        return tuple(config for config in savers if len(config.knobs_on) == most)

    def _knobs_on(self, config: TrialConfig) -> tuple[bool, ...]:
        return tuple(field in config.knobs_on for field in KNOBS)

    def params(self, config: TrialConfig) -> dict[str, Any]:
        """A configuration as Optuna's parameters."""
        return {dimension.field: getattr(config, dimension.field) for dimension in self.dimensions}

    def config_of(self, trial: optuna.trial.FrozenTrial) -> TrialConfig | None:
        """The configuration of a stored trial; None for one that was stopped before it had all parameters."""
        params = trial.system_attrs.get("fixed_params", trial.params)
        if set(params) != set(self.distributions):
            return None
        return TrialConfig(**params)

    def nearest(self, params: Mapping[str, Any], candidates: Sequence[TrialConfig]) -> TrialConfig:
        """The candidate closest to a proposal: of its ZeRO stage if there is one, then of its knobs, then in log2."""
        knobs = [dimension.field for dimension in self.dimensions if dimension.off is not None]

        def distance(config: TrialConfig) -> tuple[bool, int, float]:
            sizes = math.hypot(
                math.log2(config.micro_batch_size / params["micro_batch_size"]),
                math.log2(config.gradient_accumulation_steps / params["gradient_accumulation_steps"]),
            )
            others = sum(getattr(config, field) != params[field] for field in knobs)
            return config.zero_stage != params["zero_stage"], others, sizes

        return min(candidates, key=distance)

    def to_json(self) -> dict[str, Any]:
        """Returns what identifies the space."""
        document: dict[str, Any] = {
            "dimensions": {
                name: optuna.distributions.distribution_to_json(distribution)
                for name, distribution in self.distributions.items()
            },
            "max_global_batch": self.limits.max_global_batch if self.limits.global_batch is None else None,
            "global_batch": self.limits.global_batch,
        }
        if self.own is not None:
            document["own"] = self.own.name
        if self.restricted_to is not None:
            names = " ".join(config.name for config in self.legal)
            digest = hashlib.sha256(names.encode()).hexdigest()[:12]
            document["only"] = f"{len(self.legal)} configurations ({digest})"
        return document


def study_space(
    limits: Limits,
    *,
    preset: str,
    allowed: Collection[str],
    workload: Workload,
    machine: Machine,
    restricted_to: Sequence[TrialConfig] | None = None,
    own: TrialConfig | None = None,
    with_untuned: bool = False,
) -> Space:
    """The space of a study; configurations that it is restricted to have their own knobs, whatever the preset.

    Raises:
        UsageError: no configuration is left.
    """
    if restricted_to is not None:
        return Space(limits, restricted_to=restricted_to, own=own)
    context = knob_context_of(workload, machine)
    dimensions = dimensions_of(preset, context, allowed, own)
    return Space(limits, dimensions, context=context, own=own, with_untuned=with_untuned)
