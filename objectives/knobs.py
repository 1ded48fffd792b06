"""What a knob of a `TrialConfig` is: its values, when it has a meaning, and how it reaches DeepSpeed or the model.

A knob that is a DeepSpeed setting is one entry: a field of `TrialConfig` declared with `knob(...)`. Names, table
columns, search dimensions, recorded surfaces and the exported files derive from it. A knob of the model itself
(`in_model`) also needs its lines in `objectives.rank.knobs`, which run where torch is.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Scalar: TypeAlias = int | str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What decides, besides the configuration, whether a knob has a meaning."""

    device: str = "cuda"
    ranks: int = 1
    vocabulary: int = 0
    """Columns of the output projection; 0 where they are not known."""
    flash_attention: bool = False
    """The FlashAttention-2 package is installed and the GPUs can run it (compute capability 8.0 and up)."""


Exists: TypeAlias = Callable[[Mapping[str, Any], Site], bool]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """One knob; its value "off" leaves things as the user's settings, DeepSpeed or transformers have them."""

    off: Scalar
    values: tuple[Scalar, ...]
    """The others, in the order to list them."""
    label: str
    """In names, before the value."""
    short: str
    """A column's heading."""
    meaning: str
    """One sentence for the documentation."""
    exists: Exists
    writes: Callable[[Any], Mapping[str, Any]] | None
    """What of the DeepSpeed configuration it sets."""
    in_model: bool
    """Whether it changes how the model runs, so that the training script has to do it."""
    speed: tuple[Scalar, ...]
    """Those of `values` that usually pay and keep the numbers: the preset `speed` has them."""
    numerics: str | None
    """What it changes about the numbers that training produces; such a knob is searched only on request."""

    def words(self, value: Scalar) -> str:
        """A value in a configuration's name, large counts as DeepSpeed's autotuner writes them."""
        if isinstance(value, str):
            return f"{self.label}-{value}"
        return f"{self.label}{value:.1e}" if value >= 10**6 else f"{self.label}{value}"


def always(config: Mapping[str, Any], site: Site) -> bool:
    """For a knob that has a meaning everywhere."""
    return True


def knob(
    *,
    off: Scalar,
    values: tuple[Scalar, ...],
    label: str,
    short: str,
    meaning: str,
    exists: Exists = always,
    writes: Callable[[Any], Mapping[str, Any]] | None = None,
    in_model: bool = False,
    speed: tuple[Scalar, ...] = (),
    numerics: str | None = None,
) -> Any:
    """A field of `TrialConfig` that is a knob; see `Knob` for the arguments."""
    entry = Knob(
        off=off,
        values=values,
        label=label,
        short=short,
        meaning=meaning,
        exists=exists,
        writes=writes,
        in_model=in_model,
        speed=speed,
        numerics=numerics,
    )
    return dataclasses.field(default=off, metadata={"knob": entry})


def zero(**settings: Any) -> Mapping[str, Any]:
    """Settings of DeepSpeed's `zero_optimization`."""
    return {"zero_optimization": settings}


def partitions(config: Mapping[str, Any], site: Site) -> bool:
    """ZeRO spreads something over several ranks."""
    return bool(config["zero_stage"] >= 1 and site.ranks > 1)


def reduces_by_owner(config: Mapping[str, Any], site: Site) -> bool:
    """ZeRO-1 and 2, whose gradients go to the rank that owns them."""
    return config["zero_stage"] in (1, 2) and site.ranks > 1


def gathers(config: Mapping[str, Any], site: Site) -> bool:
    """ZeRO-3 over several ranks: parameters are gathered layer by layer."""
    return bool(config["zero_stage"] == 3 and site.ranks > 1)


def has_states_apart(config: Mapping[str, Any], site: Site) -> bool:
    """Stages whose optimizer DeepSpeed can keep elsewhere; on a CPU it is there already."""
    return bool(config["zero_stage"] >= 1 and site.device == "cuda")


def keeps_its_blocks_whole(config: Mapping[str, Any], site: Site) -> bool:
    """ZeRO-3's hooks around each module break a compiled block into pieces."""
    return bool(config["zero_stage"] != 3)


def has_an_odd_vocabulary(config: Mapping[str, Any], site: Site) -> bool:
    """Matrix units work on multiples of 64 columns; GPT-2's 50257 is none."""
    return site.vocabulary % 64 != 0


def on_a_gpu(config: Mapping[str, Any], site: Site) -> bool:
    return site.device == "cuda"


def attention_runs(config: Mapping[str, Any], site: Site) -> bool:
    """What a GPU generation cannot run is never offered."""
    return site.device == "cuda" and (config["attention"] != "flash_attention_2" or site.flash_attention)
