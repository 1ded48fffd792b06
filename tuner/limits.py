"""Bounds on the batch sizes that a study may try."""

import dataclasses

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.trial import TrialConfig


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on the batch sizes of a study."""

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
        for field, value in (
            ("max_micro_batch", self.max_micro_batch),
            ("max_global_batch", self.max_global_batch),
        ):
            if value < 1:
                raise UsageError(f"`{field}` must be at least 1 (got {value})")
        if self.global_batch is not None:
            if self.global_batch < 1 or self.global_batch % self.ranks:
                raise UsageError(f"`global_batch={self.global_batch}` must be a multiple of the {self.ranks} ranks")
        elif self.max_global_batch < self.ranks:
            raise UsageError(
                f"`max_global_batch={self.max_global_batch}` is less than one sample on each of {self.ranks} ranks"
            )

    def allow(self, config: TrialConfig) -> bool:
        """Whether a configuration keeps to them."""
        samples = config.global_batch_size(self.ranks)
        fits = samples <= self.max_global_batch if self.global_batch is None else samples == self.global_batch
        return fits and config.micro_batch_size <= self.max_micro_batch
