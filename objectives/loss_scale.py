"""Whether DeepSpeed applies fp16's loss scale at ZeRO stage 0: from 0.18.3 on it does not.

There `engine.backward` multiplies the loss by the scale for the optimizers of ZeRO alone, while stage 0's divides the
gradients by it all the same. They come out 65,536 times too small, most of them zero, and training stalls (DeepSpeed
pull request 8393, open in November 2026).
"""

import importlib.metadata

from packaging.specifiers import SpecifierSet

FORGETS_AT_STAGE_0 = SpecifierSet(">=0.18.3")
"""Versions of DeepSpeed. `tests/objectives/test_loss_scale.py` fails with the first that remembers; end the range
there."""

STAGE_0_LEFT_OUT = (
    f"ZeRO stage 0 is left out: in fp16 DeepSpeed {importlib.metadata.version('deepspeed')} does not scale the loss "
    "there, so its training stalls."
)
"""What a person is told."""


def forgets_loss_scale(zero_stage: int, dtype: str, deepspeed_version: str | None = None) -> bool:
    """Whether training in this precision at this stage loses its gradients.

    Args:
        dtype: `fp16`, `bf16` or `fp32`; only fp16 has a loss scale.
        deepspeed_version: the installed one, where none is given.
    """
    if zero_stage != 0 or dtype != "fp16":
        return False
    version = deepspeed_version or importlib.metadata.version("deepspeed")
    return FORGETS_AT_STAGE_0.contains(version, prereleases=True)
