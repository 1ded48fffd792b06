"""Micro-batches of samples with their own lengths, padded to the longest of each, as a Trainer's are."""

import itertools
from collections.abc import Iterator

import datasets
import torch

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.rank.data import batches
from ds_tune.objectives.rank.tokens import sample_ids
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

NOT_A_TARGET = -100
"""Label of padding, which takes no part in the loss."""

LONGEST_STEPS = 2
"""Optimizer steps that begin a trial with the longest samples: in the second one the optimizer has its states."""


def load_samples(workload: HuggingFaceWorkload, vocab_size: int) -> datasets.Dataset:
    """A dataset with the column `input_ids`, whose rows have their own `length` of up to `seq_len` tokens.

    Raises:
        UsageError: the dataset cannot be read, or has no sample of two tokens.
    """
    rows = [[token % vocab_size for token in ids] for ids in sample_ids(workload)]
    if not rows:
        raise UsageError(f"`dataset={workload.dataset}` has no sample of two tokens or more")
    return datasets.Dataset.from_dict({"input_ids": rows, "length": [len(row) for row in rows]}).with_format("torch")


def padded_batches(
    samples: datasets.Dataset, micro_batch_size: int, accumulation: int, *, rank: int, ranks: int, pin: bool
) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of this rank's share, for ever: `input_ids`, `attention_mask` and `labels`.

    The longest samples of all come first, on every rank and in every micro-batch of the first steps, so that what fits
    there fits whenever they meet.

    Args:
        accumulation: micro-batches of an optimizer step.
    """
    lengths = samples.with_format(None)["length"][:]
    by_length = sorted(range(len(samples)), key=lambda index: lengths[index], reverse=True)
    widest = itertools.islice(itertools.cycle(by_length), micro_batch_size * ranks)
    longest = pad([samples[index] for index in list(widest)[rank::ranks]])
    yield from itertools.repeat(longest, LONGEST_STEPS * accumulation)
    yield from batches(samples, micro_batch_size, rank=rank, ranks=ranks, pin=pin, collate_fn=pad)


def pad(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows as one micro-batch, each (rows, tokens of the longest): padding is masked, and no target."""
    ids = [row["input_ids"] for row in rows]
    lengths = torch.tensor([len(each) for each in ids])
    input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": input_ids.masked_fill(mask == 0, NOT_A_TARGET),
    }
