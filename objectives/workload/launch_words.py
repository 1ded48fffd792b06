"""Words of launch lines that more than one kind of training has."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ds_tune.objectives.knobs import Scalar


def knob_words(knobs: Mapping[str, Scalar]) -> list[str]:
    """Arguments that say knobs of a model; `objectives.rank.knobs.parse_knobs` reads them."""
    return [word for field, value in knobs.items() for word in ("--knob", f"{field}={value}")]


def module_option(launcher: Sequence[str]) -> str:
    """Option by which a launcher is told a module in place of a file."""
    return "--module" if Path(launcher[0]).name == "deepspeed" else "-m"
