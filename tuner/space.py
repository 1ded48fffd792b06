"""What is searched: one `Dimension` a knob, and the legal configurations they span.

Adding a knob is one entry in `DIMENSIONS`, beside the field of `TrialConfig` that it sets.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from objectives.errors import UsageError
from objectives.trial import TrialConfig

ZERO_STAGES = (0, 1, 2, 3)

BATCH_FIELDS = ("micro_batch_size", "gradient_accumulation_steps")
"""The two knobs whose product is bounded; what one may be depends on the other."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What bounds the batch sizes of a study."""

    ranks: int
    max_micro_batch: int
    max_global_batch: int
    global_batch: int | None = None
    """Where given, every configuration trains on exactly this many samples a step."""

    def check(self) -> None:
        """
        Raises:
            UsageError: no configuration could keep to these limits.
        """
        for option, value in (
            ("--max-micro-batch", self.max_micro_batch),
            ("--max-global-batch", self.max_global_batch),
        ):
            if value < 1:
                raise UsageError(f"{option} must be at least 1 (got {value})")
        if self.global_batch is not None:
            if self.global_batch < 1 or self.global_batch % self.ranks:
                raise UsageError(f"--global-batch {self.global_batch} must be a multiple of the {self.ranks} ranks")
        elif self.max_global_batch < self.ranks:
            raise UsageError(
                f"--max-global-batch {self.max_global_batch} is less than one sample on each of {self.ranks} ranks"
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """One searched knob."""

    field: str
    """The field of `TrialConfig` that it sets, and its name in Optuna."""
    short: str
    """Its column's heading."""
    distribution: Callable[[Limits], BaseDistribution]

    def values(self, limits: Limits) -> Sequence[int]:
        """Every value it can take, in ascending order."""
        match self.distribution(limits):
            case CategoricalDistribution(choices=choices):
                return [int(choice) for choice in choices if choice is not None]
            case IntDistribution(low=low, high=high):
                return range(low, high + 1)
            case other:
                raise TypeError(f"{self.field}: a {type(other).__name__} cannot be enumerated")


def _largest_micro_batch(limits: Limits) -> int:
    return min(limits.max_micro_batch, (limits.global_batch or limits.max_global_batch) // limits.ranks)


def _largest_accumulation(limits: Limits) -> int:
    return (limits.global_batch or limits.max_global_batch) // limits.ranks


DIMENSIONS = (
    Dimension(field="zero_stage", short="stage", distribution=lambda limits: CategoricalDistribution(ZERO_STAGES)),
    Dimension(
        field="micro_batch_size",
        short="mbs",
        distribution=lambda limits: IntDistribution(1, _largest_micro_batch(limits), log=True),
    ),
    Dimension(
        field="gradient_accumulation_steps",
        short="gas",
        distribution=lambda limits: IntDistribution(1, _largest_accumulation(limits), log=True),
    ),
)


class Space:
    """The configurations of one study: all combinations of the dimensions that keep to the limits."""

    def __init__(self, limits: Limits, dimensions: Sequence[Dimension] = DIMENSIONS) -> None:
        limits.check()
        self.limits = limits
        self.dimensions = tuple(dimensions)
        self.distributions = {dimension.field: dimension.distribution(limits) for dimension in self.dimensions}

    @functools.cached_property
    def legal(self) -> tuple[TrialConfig, ...]:
        """Every configuration that may be proposed, the batch sizes ascending within each ZeRO stage."""
        others = [dimension for dimension in self.dimensions if dimension.field not in BATCH_FIELDS]
        return tuple(
            TrialConfig(
                **dict(zip((dimension.field for dimension in others), values, strict=True)),
                micro_batch_size=micro_batch_size,
                gradient_accumulation_steps=accumulation,
            )
            for values in itertools.product(*(dimension.values(self.limits) for dimension in others))
            for micro_batch_size, accumulation in self._batch_sizes()
        )

    def _batch_sizes(self) -> Iterator[tuple[int, int]]:
        """Every (micro_batch_size, gradient_accumulation_steps) within the limits."""
        limits = self.limits
        for micro_batch_size in range(1, _largest_micro_batch(limits) + 1):
            if limits.global_batch is None:
                most = limits.max_global_batch // (limits.ranks * micro_batch_size)
                yield from ((micro_batch_size, accumulation) for accumulation in range(1, most + 1))
            elif (limits.global_batch // limits.ranks) % micro_batch_size == 0:
                yield micro_batch_size, limits.global_batch // limits.ranks // micro_batch_size

    def baselines(self) -> tuple[TrialConfig, ...]:
        """The untuned configuration, then what to fall back on where it does not fit: mbs 1 under more partitioning."""
        accumulation = self.limits.global_batch // self.limits.ranks if self.limits.global_batch is not None else 1
        return tuple(
            TrialConfig(zero_stage=stage, micro_batch_size=1, gradient_accumulation_steps=accumulation)
            for stage in ZERO_STAGES
        )

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
        """The candidate closest to a proposal: of its ZeRO stage if there is one, else in log2 of the sizes."""

        def distance(config: TrialConfig) -> tuple[bool, float]:
            sizes = math.hypot(
                math.log2(config.micro_batch_size / params["micro_batch_size"]),
                math.log2(config.gradient_accumulation_steps / params["gradient_accumulation_steps"]),
            )
            return config.zero_stage != params["zero_stage"], sizes

        return min(candidates, key=distance)

    def to_json(self) -> dict[str, Any]:
        """What identifies the space."""
        return {
            "dimensions": {
                name: optuna.distributions.distribution_to_json(distribution)
                for name, distribution in self.distributions.items()
            },
            "max_global_batch": self.limits.max_global_batch if self.limits.global_batch is None else None,
            "global_batch": self.limits.global_batch,
        }
