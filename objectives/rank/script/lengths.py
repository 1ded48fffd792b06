"""Lengths of a script's samples, as its first steps showed them."""

import math
from typing import Any

from ds_tune.objectives.rank.distributed import Peers
from ds_tune.objectives.rank.micro_batch import MicroBatch


class SeenLengths:
    """Rows of the micro-batches so far, with and without padding. Waits for the device: nothing is timed meanwhile."""

    def __init__(self) -> None:
        self._rows = 0
        self._elements = 0
        self._tokens = 0
        self._lengths: list[int] = []
        self._widths: set[int | None] = set()
        self._padding_is_known = True

    def add(self, batch: MicroBatch) -> None:
        """Takes a micro-batch into account."""
        if batch.is_empty:
            return
        lengths = batch.lengths()
        self._rows += batch.rows
        self._widths.add(batch.width)
        self._elements += batch.rows * (batch.width or 0)
        self._tokens += sum(lengths)
        self._lengths += lengths
        self._padding_is_known = self._padding_is_known and batch.count(is_packed=batch.is_packed()) is not None

    def facts(self, peers: Peers, configured: int, *, is_packed: bool) -> dict[str, Any]:
        """Fields of `ScriptFacts` that are of lengths, over the samples of all ranks.

        Args:
            configured: samples of all ranks by the engine's configuration.
        """
        rows, elements, tokens = peers.total([self._rows, self._elements, self._tokens])
        widths = [width for width in self._widths if width is not None]
        # The largest of a rank's negative figures is the smallest of all.
        extremes = [*_span(self._lengths), *_span(widths), self._padding_is_known is False, None in self._widths]
        longest, shortest, widest, narrowest, is_unknown, has_others = peers.slowest([float(each) for each in extremes])
        of_one_width = widest == -narrowest and not has_others
        if not tokens or has_others or (is_unknown and not of_one_width):
            return {"tokens_per_sample": None, "is_packed": is_packed}
        # Fewer rows than configured: the last batch of the data. More: the model is called several times a micro-step.
        samples = configured if is_packed else min(rows, configured)
        return {
            "tokens_per_sample": int(widest) if of_one_width and not is_packed else None,
            "mean_tokens_per_sample": tokens / samples,
            "shortest_sample": None if is_packed else int(-shortest),
            "longest_sample": None if is_packed else int(longest),
            "padding_share": 1 - tokens / elements,
            "is_packed": is_packed,
        }


def _span(values: list[int]) -> tuple[float, float]:
    """The largest value, and the smallest with its sign turned; of none, what any other outdoes."""
    return (max(values), -min(values)) if values else (-math.inf, -math.inf)
