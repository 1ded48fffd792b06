"""Torch's attention kernels, one by one, as attention implementations of transformers."""

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
"""By the knob's value. The last is never searched: it is eager attention under another name, but runs everywhere."""


def implementation_of(attention: str) -> str:
    """Name that transformers has for a value of the knob `attention`; a kernel of torch's is made known to it first.

    The kernel is chosen around each call and not around the step, so that a block that is computed again in the
    backward pass has the same one.
    """
    backend = BACKENDS.get(attention)
    if backend is None:
        return attention
    # Transformers takes any name with "flash" in it for the FlashAttention package.
    name = f"sdpa_kernel_{list(BACKENDS).index(attention)}"

    def attend(*arguments: Any, **named: Any) -> tuple[torch.Tensor, None]:
        with sdpa_kernel(backend):
            found: tuple[torch.Tensor, None] = sdpa_attention_forward(*arguments, **named)
        return found

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name
