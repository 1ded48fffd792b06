"""Blocks of tokens behind a DataLoader, as transformers' `run_clm.py` feeds a model."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import torch

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.rank.dataset import Samples, open_samples
from ds_tune.objectives.rank.tokens import Encoder
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

TOKEN_BLOCKS = 512
"""Enough for every global batch to differ from the last; the stream starts over behind it."""


def load_blocks(workload: HuggingFaceWorkload, vocab_size: int) -> datasets.Dataset:
    """A dataset with the column `input_ids`, rows of `seq_len` tokens.

    Raises:
        UsageError: the dataset cannot be read, has no text, or too little of it for one block.
    """
    if workload.dataset is None:
        random = np.random.default_rng(0)
        tokens = random.integers(0, vocab_size, size=(TOKEN_BLOCKS, workload.seq_len), dtype=np.int64)
        return datasets.Dataset.from_dict({"input_ids": list(tokens)}).with_format("torch")
    samples = open_samples(workload.dataset, workload.text_column)
    stream = _token_stream(samples, workload, vocab_size)
    wanted = TOKEN_BLOCKS * workload.seq_len
    tokens = np.fromiter(itertools.islice(stream, wanted), dtype=np.int64)
    blocks = len(tokens) // workload.seq_len
    if blocks == 0:
        raise UsageError(
            f"`dataset={workload.dataset}` holds {len(tokens)} tokens, too few for one block of "
            f"`seq_len={workload.seq_len}`"
        )
    tokens = tokens[: blocks * workload.seq_len].reshape(blocks, workload.seq_len)
    return datasets.Dataset.from_dict({"input_ids": list(tokens)}).with_format("torch")


def _token_stream(samples: Samples, workload: HuggingFaceWorkload, vocab_size: int) -> Iterator[int]:
    """Every token of the dataset, one after the other."""
    encode: Callable[[Any], list[int]] = list if samples.reading.is_ids else Encoder(workload).encode
    for sample in samples:
        yield from (token % vocab_size for token in encode(sample))


def batches(
    blocks: datasets.Dataset,
    micro_batch_size: int,
    *,
    rank: int,
    ranks: int,
    pin: bool,
    collate_fn: Callable[[list[dict[str, torch.Tensor]]], dict[str, torch.Tensor]] | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of this rank's share, for ever: `input_ids` and `labels`, each (micro_batch_size, seq_len).

    Args:
        collate_fn: makes another micro-batch of rows; None for `collate`.
    """
    needed = micro_batch_size * ranks
    if len(blocks) < needed:  # fewer blocks than one global micro-batch: use them several times
        copies = -(-needed // len(blocks))
        blocks = datasets.concatenate_datasets([blocks] * copies).with_format("torch")
    sampler: torch.utils.data.distributed.DistributedSampler[Any] = torch.utils.data.distributed.DistributedSampler(
        blocks, num_replicas=ranks, rank=rank, drop_last=True
    )
    loader = torch.utils.data.DataLoader(
        blocks,
        batch_size=micro_batch_size,
        sampler=sampler,
        drop_last=True,
        pin_memory=pin,
        collate_fn=collate_fn or collate,
    )
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from loader


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows of the dataset as one micro-batch, which is its own label: models shift it themselves."""
    input_ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids.clone()}
