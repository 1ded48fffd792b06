"""What a script's optimizer steps were fed: tokens, padding apart, and whether the data was begun anew."""

from collections.abc import Sequence

import torch

from ds_tune.objectives.rank.distributed import Peers
from ds_tune.objectives.rank.script.micro_batch import MicroBatch

MOST_LEFT_OUT = 3
"""Steps in a row that are left out because data was begun anew in them. Where all are such steps, the data is as short
as that, and the training is so, too."""


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
        self._renewed: list[bool] = []
        self._step: list[torch.Tensor | float] = []
        self._in_a_row = 0
        """Steps just before those of this reading in which data was begun anew, one after another."""

    def fed(self, batch: MicroBatch) -> None:
        """A micro-batch is given to the engine."""
        if self._tokens_per_sample is None or batch.is_empty:
            return
        count = batch.count(is_packed=self._is_packed)
        self._step.append(batch.rows * self._tokens_per_sample if count is None else count)

    def step_done(self, *, renewed: bool) -> None:
        """An optimizer step has ended.

        Args:
            renewed: data was begun anew in it, as at the end of an epoch.
        """
        self._counts.append(self._step)
        self._renewed.append(renewed)
        self._step = []

    def left_out(self) -> list[bool]:
        # Of any rank: all leave out the same steps.
        self._renewed = [value > 0 for value in self._peers.slowest([float(each) for each in self._renewed])]
        return left_out(self._renewed, self._in_a_row)

    def shares(self) -> list[float]:
        if self._tokens_per_sample is None:
            return [1.0] * len(self._counts)
        tokens = self._peers.total([float(sum(float(count) for count in step)) for step in self._counts])
        mean = self._samples * self._tokens_per_sample
        return [of_step / mean or 1.0 for of_step in tokens]

    def forget(self) -> None:
        for is_renewed in self._renewed:
            self._in_a_row = self._in_a_row + 1 if is_renewed else 0
        self._counts, self._renewed, self._step = [], [], []


def left_out(renewed: Sequence[bool], before: int = 0) -> list[bool]:
    """Which steps are left out.

    Args:
        renewed: whether data was begun anew, by step.
        before: in how many it was, one after another, just before the first of these.
    """
    answers, in_a_row = [], before
    for is_renewed in renewed:
        in_a_row = in_a_row + 1 if is_renewed else 0
        answers.append(is_renewed and in_a_row <= MOST_LEFT_OUT)
    return answers
