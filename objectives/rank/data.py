"""Blocks of tokens behind a DataLoader, as transformers' `run_clm.py` feeds a model."""

import itertools
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import torch
import transformers

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.workload.huggingface import (
    SHIPPED_MODELS,
    HuggingFaceWorkload,
    dataset_files,
    model_config_path,
)

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
    rows = _open(workload.dataset)
    stream = _token_stream(rows, workload, vocab_size)
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


def _open(name: str) -> datasets.Dataset:
    try:
        try:
            builder, files = dataset_files(name)
        except UsageError:  # not on this disk: a hub id, as `check_workload` has seen
            return datasets.load_dataset(name, split="train")
        return datasets.load_dataset(builder, data_files=files, split="train")
    except Exception as error:  # the loaders of many formats raise errors of many libraries
        reason = error.__cause__ or error  # `datasets` wraps the reader's own words
        said = str(reason).strip().splitlines() or [f"{type(reason).__name__} in its reader; is it empty?"]
        raise UsageError(f"`dataset={name}` cannot be read: {said[0]}") from error


def _token_stream(rows: datasets.Dataset, workload: HuggingFaceWorkload, vocab_size: int) -> Iterator[int]:
    """Every token of the dataset, one after the other: its own `input_ids`, or its text, tokenized."""
    columns = rows.column_names
    if "input_ids" in columns:
        for row in rows:
            yield from (token % vocab_size for token in row["input_ids"] or ())
        return
    text_column = (
        "text" if "text" in columns else next((c for c in columns if rows.features[c].dtype == "string"), None)
    )
    if text_column is None:
        found = ", ".join(columns)
        raise UsageError(f"`dataset={workload.dataset}` has neither a text nor an input_ids column (it has {found})")
    encode = _encoder(workload)
    for row in rows:
        yield from (token % vocab_size for token in encode(row[text_column] or ""))  # None where a cell is empty


def _encoder(workload: HuggingFaceWorkload) -> Any:
    """Text to token ids. A shipped model has no tokenizer on disk: its text is read as bytes.

    How fast a model trains does not depend on which ids it sees, so bytes measure the same.
    """
    name = workload.tokenizer
    if name is None and not workload.pretrained:
        if workload.model in SHIPPED_MODELS:
            return lambda text: text.encode()
        path = model_config_path(workload.model)
        if path is not None and not any(path.parent.glob("token*")) and not (path.parent / "vocab.json").is_file():
            return lambda text: text.encode()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name or workload.model)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no tokenizer for `dataset`: {str(error).splitlines()[0]} (name one with `tokenizer`)"
        ) from error
    return lambda text: tokenizer(text)["input_ids"]


def batches(
    blocks: datasets.Dataset, micro_batch_size: int, *, rank: int, ranks: int, pin: bool
) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of this rank's share, for ever: `input_ids` and `labels`, each (micro_batch_size, seq_len)."""
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
        collate_fn=collate,
    )
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from loader


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows of the dataset as one micro-batch, which is its own label: models shift it themselves."""
    input_ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids.clone()}
