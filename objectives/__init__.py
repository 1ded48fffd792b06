"""One trial: what it is, and how it is run and timed. Nothing here knows Optuna.

`apply_knobs` is for training scripts of one's own.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_tune.objectives.rank.knobs import apply_knobs

__all__ = ["apply_knobs"]


def __getattr__(name: str) -> Any:
    """Imports on use: the tuner, which imports this package, does without torch."""
    if name == "apply_knobs":
        from ds_tune.objectives.rank.knobs import apply_knobs

        return apply_knobs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
