"""Names of GPUs and of machines as `nvidia-smi`, shops and clouds write them, in the words of the catalogue."""

import difflib
import re
from collections.abc import Sequence

_WORDS = re.compile(
    r"\b(nvidia|tesla|geforce|quadro|gpus?|tensor core|graphics|sxm\d*|sxm|pcie|hbm\d\w*|ampere|hopper|blackwell)\b"
)

ALIASES = {
    "a10g": "A10", "rtxa6000": "A6000", "a40": "A6000", "a800": "A100-80GB", "h800": "H100", "h100nvl": "H100",
    "b100": "B200", "dgxh100": "H100", "hgxh100": "H100", "hgxh200": "H200", "dgxh200": "H200", "dgxb200": "B200",
}  # fmt: skip
"""GPUs that train like one of the catalogue, as `hardware_of` takes what `nvidia-smi` says for it."""

NEAR = {
    "mi300x": "B200", "mi250x": "H200", "gh200": "H200", "gb200": "B200", "h20": "H100", "a30": "A10",
    "p100": "V100-16GB",
}  # fmt: skip
"""What is nearest to GPUs that are not in the catalogue, in memory and speed."""

_AWS = {
    "p3.2xlarge": (1, "V100-16GB"), "p3.8xlarge": (4, "V100-16GB"), "p3.16xlarge": (8, "V100-16GB"),
    "p3dn.24xlarge": (8, "V100-32GB"), "p4d.24xlarge": (8, "A100-40GB"), "p4de.24xlarge": (8, "A100-80GB"),
    "p5.4xlarge": (1, "H100"), "p5.48xlarge": (8, "H100"), "p5e.48xlarge": (8, "H200"), "p5en.48xlarge": (8, "H200"),
    "p6-b200.48xlarge": (8, "B200"),
    **{f"g4dn.{size}": (count, "T4") for size, count in
       {"xlarge": 1, "2xlarge": 1, "4xlarge": 1, "8xlarge": 1, "16xlarge": 1, "12xlarge": 4, "metal": 8}.items()},
    **{f"{family}.{size}": (count, gpu) for family, gpu in (("g5", "A10"), ("g6", "L4"), ("g6e", "L40S"))
       for size, count in {"xlarge": 1, "2xlarge": 1, "4xlarge": 1, "8xlarge": 1, "16xlarge": 1, "12xlarge": 4,
                           "24xlarge": 4, "48xlarge": 8}.items()},
}  # fmt: skip
_GOOGLE = {
    **{f"a2-highgpu-{count}g": (count, "A100-40GB") for count in (1, 2, 4, 8)}, "a2-megagpu-16g": (16, "A100-40GB"),
    **{f"a2-ultragpu-{count}g": (count, "A100-80GB") for count in (1, 2, 4, 8)},
    **{f"a3-highgpu-{count}g": (count, "H100") for count in (1, 2, 4, 8)}, "a3-megagpu-8g": (8, "H100"),
    "a3-edgegpu-8g": (8, "H100"), "a3-ultragpu-8g": (8, "H200"), "a4-highgpu-8g": (8, "B200"),
    **{f"g2-standard-{cores}": (count, "L4") for cores, count in
       {4: 1, 8: 1, 12: 1, 16: 1, 32: 1, 24: 2, 48: 4, 96: 8}.items()},
}  # fmt: skip
_AZURE = {
    "nc6s_v3": (1, "V100-16GB"), "nc12s_v3": (2, "V100-16GB"), "nc24s_v3": (4, "V100-16GB"),
    "nc24rs_v3": (4, "V100-16GB"), "nd40rs_v2": (8, "V100-32GB"), "nc4as_t4_v3": (1, "T4"), "nc8as_t4_v3": (1, "T4"),
    "nc16as_t4_v3": (1, "T4"), "nc64as_t4_v3": (4, "T4"), "nc24ads_a100_v4": (1, "A100-80GB"),
    "nc48ads_a100_v4": (2, "A100-80GB"), "nc96ads_a100_v4": (4, "A100-80GB"), "nd96asr_v4": (8, "A100-40GB"),
    "nd96amsr_a100_v4": (8, "A100-80GB"), "nd96isr_h100_v5": (8, "H100"), "nd96isr_h200_v5": (8, "H200"),
}  # fmt: skip
INSTANCES = {**_AWS, **_GOOGLE, **_AZURE}
"""GPUs of machines that clouds rent, from their pages on instance types in November 2026."""


def instance(name: str) -> tuple[int, str] | None:
    """How many GPUs of which name a cloud's machine has; None where none is called so."""
    return INSTANCES.get(name.strip().lower().removeprefix("standard_"))


def cleaned(name: str) -> str:
    """A GPU's name without its maker, socket and kind of memory: `A100 80GB` of `NVIDIA A100-SXM4-80GB`."""
    words = re.sub(r"[\s_-]+", " ", name.lower())
    return " ".join(_WORDS.sub(" ", words).split())


def alias(name: str) -> str | None:
    """The name in the catalogue of what trains like it; None where that is not known."""
    return ALIASES.get(re.sub(r"[^a-z0-9]", "", cleaned(name)))


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The name, or the cloud's machine, that was perhaps meant, or comes nearest; None where nothing does."""
    plain = re.sub(r"[^a-z0-9]", "", re.sub(r"\b\d+ ?gi?b\b", "", cleaned(name)))
    if plain in NEAR:
        return NEAR[plain]
    spelled = {re.sub(r"[^a-z0-9]", "", each.lower()): each for each in (*known, *INSTANCES)}
    found = difflib.get_close_matches(re.sub(r"[^a-z0-9.]", "", name.lower()), spelled, n=1, cutoff=0.75)
    return spelled[found[0]] if found else None
