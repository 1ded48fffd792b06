"""What the optimizer steps of a loop were fed where samples differ in length: tokens, padding apart."""

import torch

from ds_tune.objectives.rank.distributed import Peers
from ds_tune.objectives.rank.micro_batch import MicroBatch


class FedSteps:
    """What the steps since the last reading were fed, on this rank; told in the order of a training loop.

    See `StepNotes`. Counts stay on the device until they are asked for.
    """

    def __init__(
        self, peers: Peers, *, samples_per_step: int, tokens_per_sample: float | None, is_packed: bool
    ) -> None:
        """
        Args:
            samples_per_step: of all ranks.
            tokens_per_sample: mean of the samples, padding apart; None where samples are what is counted.
            is_packed: samples are put into one row.
        """
        self._peers = peers
        self._samples = samples_per_step
        self._tokens_per_sample = tokens_per_sample
        self._is_packed = is_packed
        self._counts: list[list[torch.Tensor | float]] = []
        self._step: list[torch.Tensor | float] = []

    def fed(self, batch: MicroBatch) -> None:
        """A micro-batch is given to the engine."""
        if self._tokens_per_sample is None or batch.is_empty:
            return
        count = batch.count(is_packed=self._is_packed)
        self._step.append(batch.rows * self._tokens_per_sample if count is None else count)

    def step_done(self) -> None:
        """An optimizer step has ended."""
        self._counts.append(self._step)
        self._step = []

    def shares(self) -> list[float]:
        if self._tokens_per_sample is None:
            return [1.0] * len(self._counts)
        tokens = self._peers.total([float(sum(float(count) for count in step)) for step in self._counts])
        mean = self._samples * self._tokens_per_sample
        return [of_step / mean or 1.0 for of_step in tokens]

    def forget(self) -> None:
        self._counts, self._step = [], []
