"""Micro-batches of samples that differ in length, and trials that are fed them."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.rank.data_look import look_at
from ds_tune.objectives.rank.padded import LONGEST_STEPS, load_samples, pad, padded_batches
from ds_tune.objectives.trial import Measurement, Outcome, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

LENGTHS = (5, 12, 3, 8, 20, 7, 9, 4)


def workload_of(folder: Path, lengths: tuple[int, ...] = LENGTHS, seq_len: int = 16) -> HuggingFaceWorkload:
    """A workload on rows of so many tokens, unpacked: row n has the tokens n + 1."""
    path = folder / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": [n + 1] * length}) + "\n" for n, length in enumerate(lengths)))
    return HuggingFaceWorkload(model="gpt2-nano", seq_len=seq_len, dtype="fp32", dataset=str(path), packing=False)


def test_padding_is_masked_and_no_target() -> None:
    batch = pad([{"input_ids": torch.tensor([7, 8, 9])}, {"input_ids": torch.tensor([5])}])
    assert batch["input_ids"].tolist() == [[7, 8, 9], [5, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[7, 8, 9], [5, -100, -100]]


def test_samples_keep_their_lengths_up_to_the_sequence_s(tmp_path: Path) -> None:
    samples = load_samples(workload_of(tmp_path, (*LENGTHS, 1)), vocab_size=4096)
    assert [len(row["input_ids"]) for row in samples] == [5, 12, 3, 8, 16, 7, 9, 4]


def test_a_look_says_how_long_samples_are_and_what_is_counted(tmp_path: Path) -> None:
    workload = workload_of(tmp_path)
    workload = dataclasses.replace(workload, data=look_at(workload))
    assert workload.data_words.endswith("; samples padded to the longest of their micro-batch, cut at 16 tokens")
    assert workload.counting == "8 tokens a sample (3–16); tokens, padding apart, are what is counted"
    assert (workload.counted_tokens_per_sample, workload.tokens_per_sample) == (8.0, 16)
    assert workload.out_of_reach == {"compile"}


def test_samples_of_one_length_are_counted_as_samples(tmp_path: Path) -> None:
    workload = workload_of(tmp_path, (6, 6))
    workload = dataclasses.replace(workload, data=look_at(workload))
    assert (workload.counting, workload.tokens_per_sample, workload.out_of_reach) == ("", 6, frozenset())


def test_longest_samples_come_first_on_every_rank_and_all_of_them_later(tmp_path: Path) -> None:
    samples = load_samples(workload_of(tmp_path), vocab_size=4096)
    firsts, later = [], []
    for rank in range(2):
        stream = padded_batches(samples, 2, 3, rank=rank, ranks=2, pin=False)
        first, rest = (list(itertools.islice(stream, count)) for count in (3 * LONGEST_STEPS, 2))
        assert all(batch["input_ids"].equal(first[0]["input_ids"]) for batch in first)
        firsts += first[0]["attention_mask"].sum(dim=1).tolist()
        later += [row[0].item() for batch in rest for row in batch["input_ids"]]
    assert sorted(firsts) == [8, 9, 12, 16]
    assert sorted(later) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_fewer_samples_than_a_micro_batch_are_used_several_times(tmp_path: Path) -> None:
    samples = load_samples(workload_of(tmp_path, (5, 3)), vocab_size=4096)
    batches = itertools.islice(padded_batches(samples, 4, 1, rank=1, ranks=2, pin=False), 4)
    assert [batch["input_ids"].shape[0] for batch in batches] == [4, 4, 4, 4]


def test_samples_without_a_target_are_no_data(tmp_path: Path) -> None:
    workload = workload_of(tmp_path, (1, 1))
    for read in (look_at, lambda each: load_samples(each, 4096)):
        with pytest.raises(UsageError, match=r"has no sample of two tokens or more$"):
            read(workload)


def test_trial_of_padded_samples_counts_tokens_without_padding(train: Callable[..., Outcome], tmp_path: Path) -> None:
    lengths = tuple(range(4, 68))
    workload = workload_of(tmp_path, lengths, seq_len=64)
    workload = dataclasses.replace(workload, data=look_at(workload))
    config = TrialConfig(zero_stage=1, micro_batch_size=2, gradient_accumulation_steps=2)
    measured = train(config, workload=workload)
    assert isinstance(measured, Measurement), measured
    mean = sum(min(length, 64) for length in lengths) / len(lengths)
    assert measured.tokens_per_second == pytest.approx(measured.samples_per_second * mean)
    assert measured.from_parts is None
    assert measured.flops_per_sample > 0
