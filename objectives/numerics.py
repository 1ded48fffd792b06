"""Whether a tuned configuration trains as the untuned one does: their losses, step by step, side by side.

Both begin from the same seed and take the same samples, `STEPS` times over, so that what a step has learned shows in
the next loss. Dropout is off in both: which activations it drops depends on how a batch is cut into micro-batches.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

STEPS = 20

FIRST_LOSS_TOLERANCE = {"fp32": 1e-5, "fp16": 5e-5, "bf16": 4e-4}
"""Relative. Before anything is learned only rounding may differ, and a mean over thousands of tokens cancels most of
it."""

LEARNED_TOLERANCE = {"fp32": 0.01, "fp16": 0.05, "bf16": 0.10}
"""Fraction of what the reference has learned by then: rounding changes the sign of small gradients, and Adam steps by
signs."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LossCurve:
    """The loss of each optimizer step that was not skipped: the mean over all ranks and micro-batches."""

    losses: tuple[float, ...]
    """Finite; shorter than `STEPS` where the next would not have been."""
    skipped_steps: int
    """Steps that fp16 overflow skipped; each was repeated."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        return cls(losses=tuple(document["losses"]), skipped_steps=document["skipped_steps"])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NumericsCheck:
    """A configuration's losses beside those of its reference, and what they say."""

    reference: str
    """The name of the configuration it is compared with."""
    dtype: str
    curve: LossCurve
    reference_curve: LossCurve

    @property
    def first_loss_error(self) -> float:
        """Relative, before the first update."""
        ours, theirs = self.curve.losses, self.reference_curve.losses
        return abs(ours[0] - theirs[0]) / abs(theirs[0]) if ours and theirs else 1.0

    @property
    def learned_error(self) -> float:
        """The largest difference of two losses, as a fraction of the most that the reference's loss has changed."""
        theirs = self.reference_curve.losses
        changed = max((abs(loss - theirs[0]) for loss in theirs), default=0.0)
        pairs = zip(self.curve.losses, theirs, strict=False)
        # Where the reference has learned nothing, no difference can be explained by learning.
        return max((abs(ours - other) for ours, other in pairs), default=0.0) / max(changed, 1e-12)

    @property
    def fault(self) -> str | None:
        """Why the configuration does not train as its reference does, in one clause; None when it does."""
        steps = len(self.curve.losses)
        if steps < len(self.reference_curve.losses):
            return f"its loss is not finite at step {steps + 1}, that of {self.reference} is"
        if self.first_loss_error > FIRST_LOSS_TOLERANCE[self.dtype]:
            return (
                f"its first loss is {self.curve.losses[0]:.5f}, that of {self.reference} from the same seed and data "
                f"{self.reference_curve.losses[0]:.5f} ({self.first_loss_error:.2%} apart; "
                f"{FIRST_LOSS_TOLERANCE[self.dtype]:.3%} is rounding)"
            )
        if self.learned_error > LEARNED_TOLERANCE[self.dtype]:
            return (
                f"over {steps} steps from the same seed and data its loss differs from that of {self.reference} by "
                f"{self.learned_error:.0%} of what was learned ({LEARNED_TOLERANCE[self.dtype]:.0%} is rounding)"
            )
        return None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        return cls(
            reference=document["reference"],
            dtype=document["dtype"],
            curve=LossCurve.from_json(document["curve"]),
            reference_curve=LossCurve.from_json(document["reference_curve"]),
        )
