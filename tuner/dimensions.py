"""Dimensions of a search: one a field of `TrialConfig`, with the values that a preset has of it.

Knobs, their values and their conditions are declared in `objectives.trial`.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from ds_tune.objectives.ds_document import WRITTEN_BY_FILE
from ds_tune.objectives.knobs import KnobContext, Scalar
from ds_tune.objectives.trial import KNOBS, TrialConfig
from ds_tune.tuner.limits import Limits

ZERO_STAGES = (0, 1, 2, 3)


def zero_stages(context: KnobContext) -> tuple[int, ...]:
    """The ZeRO stages worth a trial: all at which DeepSpeed trains."""
    return ZERO_STAGES if context.stage_0_trains else ZERO_STAGES[1:]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """One searched field of `TrialConfig`."""

    field: str
    """Its name in Optuna, too."""
    short: str
    """Its column's heading."""
    distribution: Callable[[Limits], BaseDistribution]
    off: Scalar | None = None
    """The value that leaves it alone; a space where it has no other value does not have the dimension."""

    def among(self, limits: Limits, configs: Sequence[TrialConfig]) -> BaseDistribution:
        """Its distribution where only these configurations may be proposed."""
        found = {getattr(config, self.field) for config in configs}
        match self.distribution(limits):
            case IntDistribution(log=log):
                return IntDistribution(min(found), max(found), log=log)
            case _ if self.off is not None and not isinstance(self.off, int):
                return CategoricalDistribution(sorted(found, key=lambda value: (value != self.off, value)))
            case _:
                return CategoricalDistribution(sorted(found))


def knob_dimension(field: str, choices: Sequence[Scalar]) -> Dimension:
    """The dimension of a knob that has one of these values."""
    distribution = CategoricalDistribution(tuple(choices))
    return Dimension(
        field=field, short=KNOBS[field].short, distribution=lambda limits: distribution, off=KNOBS[field].off
    )


def _stage_dimension(stages: Sequence[int]) -> Dimension:
    distribution = CategoricalDistribution(tuple(stages))
    return Dimension(field="zero_stage", short="stage", distribution=lambda limits: distribution)


PRESETS = ("core", "speed", "full")


def knob_choices(
    preset: str, context: KnobContext, allowed: Collection[str] = (), own: TrialConfig | None = None
) -> dict[str, tuple[Scalar, ...]]:
    """Values of each knob in a preset, off among them; one of the model that is not searched stays.

    See `dimensions_of` for the arguments.
    """
    found: dict[str, tuple[Scalar, ...]] = {}
    for field, knob in KNOBS.items():
        values = {"core": (), "speed": knob.usual(context), "full": knob.values}[preset]
        if knob.numerics is not None:
            values = knob.values if field in allowed else ()
        if field in context.out_of_reach:
            values = ()
        kept = knob.off if own is None else getattr(own, field)
        # What DeepSpeed's file says may go, too: an offload that is not needed costs the most of all settings.
        is_searched = bool(values) or field in WRITTEN_BY_FILE
        found[field] = tuple(dict.fromkeys((knob.off, kept, *values))) if is_searched else (kept,)
    return found


def dimensions_of(
    preset: str,
    context: KnobContext | None = None,
    allowed: Collection[str] = (),
    own: TrialConfig | None = None,
) -> tuple[Dimension, ...]:
    """The dimensions of a preset.

    Args:
        preset: `core` (stage, mbs, gas), `speed` (and what usually pays) or `full` (all that keeps the numbers).
        context: decides what usually pays.
        allowed: knobs that change the numbers training produces, and are to be searched all the same.
        own: the configuration that a person trains with today.
    """
    context = context or KnobContext()
    choices = knob_choices(preset, context, allowed, own)
    knobs = [knob_dimension(field, values) for field, values in choices.items()]
    return (*stage_and_batch_dimensions(context), *knobs)


def stage_and_batch_dimensions(context: KnobContext) -> tuple[Dimension, ...]:
    """The three dimensions that every space has."""
    return (_stage_dimension(zero_stages(context)), *DIMENSIONS[1:3])


def values_of(field: str, distribution: BaseDistribution) -> Sequence[Any]:
    match distribution:
        case CategoricalDistribution(choices=choices):
            return list(choices)
        case IntDistribution(low=low, high=high):
            return range(low, high + 1)
        case other:
            raise TypeError(f"{field}: a {type(other).__name__} cannot be enumerated")


def largest_micro_batch(limits: Limits) -> int:
    return min(limits.max_micro_batch, (limits.global_batch or limits.max_global_batch) // limits.ranks)


def _largest_accumulation(limits: Limits) -> int:
    return (limits.global_batch or limits.max_global_batch) // limits.ranks


DIMENSIONS = (
    _stage_dimension(ZERO_STAGES),
    Dimension(
        field="micro_batch_size",
        short="mbs",
        distribution=lambda limits: IntDistribution(1, largest_micro_batch(limits), log=True),
    ),
    Dimension(
        field="gradient_accumulation_steps",
        short="gas",
        distribution=lambda limits: IntDistribution(1, _largest_accumulation(limits), log=True),
    ),
    *(knob_dimension(field, (knob.off,)) for field, knob in KNOBS.items()),
)
"""Dimensions of the preset `core`: the knobs are left alone, unless a study is restricted to configurations that have
them."""
