"""One micro-batch: the tensors that an engine is called with."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

PACKED_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
"""Arguments that say where samples begin that were put into one row, as FlashAttention takes them."""


class MicroBatch:
    """The arguments of a forward pass. Not kept: it holds on to the tensors."""

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Sequence[str]) -> None:
        """
        Args:
            names: of the model's positional arguments; empty where they are not known.
        """
        self._tensors = dict(_tensors(args, kwargs, names))
        self._main = self._tensors.get("input_ids", next(iter(self._tensors.values()), None))

    @property
    def is_empty(self) -> bool:
        """Whether no tensor was found."""
        return self._main is None

    @property
    def rows(self) -> int:
        """Rows of it: samples, unless they are packed."""
        return 0 if self._main is None else 1 if self._is_flat else self._main.shape[0]

    @property
    def width(self) -> int | None:
        """Tokens of a row, padding included; None where it has no tokens."""
        if self._main is None or self._main.is_floating_point():
            return None
        if self._is_flat:
            return self._main.shape[0]
        return self._main.shape[1] if self._main.dim() == 2 else None

    @property
    def _is_flat(self) -> bool:
        """Whether it has no rows at all, but one sequence of tokens."""
        if self._main is None or self._main.dim() != 1 or self._main.is_floating_point():
            return False
        return any(name in self._tensors for name in (*PACKED_KEYS, "position_ids"))

    @property
    def mask(self) -> torch.Tensor | None:
        """Not zero where there is a token, in the shape of the tokens; None where it has no such mask."""
        mask = self._tensors.get("attention_mask")
        return mask if mask is not None and self._main is not None and mask.shape == self._main.shape else None

    def is_packed(self) -> bool:
        """Whether several samples are in one row, however many it was asked for. May wait for the device."""
        if self.width is None or self.rows != 1:
            return False
        if self._is_flat or any(name in self._tensors for name in PACKED_KEYS):
            return True
        positions = self._tensors.get("position_ids")
        # Positions start anew with each sample.
        return positions is not None and self.mask is None and int(torch.count_nonzero(positions == 0)) > 1

    def lengths(self) -> list[int]:
        """Tokens of each row, padding apart where it can be told. Waits for the device."""
        if self.mask is not None and not self._is_flat:
            return [int(length) for length in torch.count_nonzero(self.mask, dim=1).tolist()]
        return [self.width or 0] * self.rows

    def count(self, *, is_packed: bool) -> torch.Tensor | int | None:
        """Tokens of it, padding apart, left on the device; None where it has none, or what is padding cannot be told.

        Rows without a mask may have any padding, and a larger micro-batch more of it.

        Args:
            is_packed: samples are put into one row.
        """
        if self.width is None:
            return None
        if self.mask is not None:
            return torch.count_nonzero(self.mask)
        return self.rows * self.width if is_packed else None


def _tensors(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Sequence[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors by their names, those of dictionaries among the arguments, too."""
    unnamed = [f"argument {index}" for index in range(len(args))]
    named = [*zip([*names[: len(args)], *unnamed[len(names) :]], args, strict=True), *kwargs.items()]
    for name, value in named:
        for key, each in value.items() if isinstance(value, Mapping) else [(name, value)]:
            if isinstance(each, torch.Tensor) and each.dim() > 0:
                yield key, each
