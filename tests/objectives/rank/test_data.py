"""Blocks of tokens from synthetic, text and tokenized data, and the batches that ranks draw from them."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.rank.data import TOKEN_BLOCKS, batches, load_blocks
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

NANO = HuggingFaceWorkload(model="gpt2-nano", seq_len=8, dtype="fp32")
TEXT = "the quick brown fox"


def blocks_of(path: Path, **changes: Any) -> list[list[int]]:
    """All blocks that a workload makes of a dataset."""
    blocks = load_blocks(dataclasses.replace(NANO, dataset=str(path), **changes), vocab_size=4096)
    return [row["input_ids"].tolist() for row in blocks]


def test_synthetic_tokens_are_the_same_on_every_rank_and_within_the_vocabulary() -> None:
    first, second = (load_blocks(NANO, vocab_size=100)["input_ids"][:] for _ in range(2))
    assert first.tolist() == second.tolist()
    assert first.shape == (TOKEN_BLOCKS, 8)
    assert first.min() >= 0 and first.max() < 100
    assert len({tuple(row) for row in first.tolist()}) == TOKEN_BLOCKS


def write(path: Path, texts: list[str]) -> None:
    """A dataset with a column `text`, in the kind of file that the path's ending says."""
    rows = datasets.Dataset.from_dict({"text": texts})
    match path.suffix:
        case ".txt":
            path.write_text("".join(f"{text}\n" for text in texts))
        case ".csv":
            rows.to_csv(path)
        case ".parquet":
            rows.to_parquet(path)
        case _:
            rows.to_json(path)


@pytest.mark.parametrize("ending", [".txt", ".json", ".jsonl", ".csv", ".parquet"])
def test_text_of_every_kind_of_file_is_cut_into_blocks_of_bytes_where_there_is_no_tokenizer(
    tmp_path: Path, ending: str
) -> None:
    path = tmp_path / f"corpus{ending}"
    write(path, [TEXT, TEXT])
    stream = (TEXT + TEXT).encode()
    assert blocks_of(path) == [list(stream[start : start + 8]) for start in range(0, 32, 8)]


def test_several_files_are_one_stream(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", ["abcdef"])
    write(tmp_path / "b.txt", ["ghijkl"])
    assert blocks_of(tmp_path / "*.txt") == [list(b"abcdefgh")]


def test_tokens_of_one_s_own_are_taken_as_they_are_within_the_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "ids.jsonl"
    path.write_text(json.dumps({"input_ids": [1, 2, 3, 4, 5, 6, 7, 5000, 9]}))
    assert blocks_of(path) == [[1, 2, 3, 4, 5, 6, 7, 5000 - 4096]]


def test_text_is_tokenized_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "quick": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path / "words")
    write(tmp_path / "corpus.txt", [TEXT, TEXT])
    assert blocks_of(tmp_path / "corpus.txt", tokenizer=str(tmp_path / "words")) == [[0, 1, 2, 2, 0, 1, 2, 2]]


def test_any_column_of_strings_is_text_where_none_has_that_name(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"id": 7, "story": "abcdefgh"}))
    assert blocks_of(path) == [list(b"abcdefgh")]


def test_rows_without_text_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "holes.csv"
    path.write_text("number,text\n1,abcd\n2,\n3,efgh\n")
    assert blocks_of(path) == [list(b"abcdefgh")]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("short.txt", "abc\n", r"holds 3 tokens, too few for one block of `seq_len=8`$"),
        (
            "numbers.jsonl",
            '{"a": 1, "b": 2}\n',
            r"neither text nor token ids to train on \(it has a: integer, b: integer\)$",
        ),
        ("broken.jsonl", '{"text":\n', "cannot be read: "),
        ("empty.csv", "", "cannot be read: "),
    ],
)
def test_a_dataset_that_feeds_nothing_is_refused_in_one_sentence(
    tmp_path: Path, name: str, content: str, sentence: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=sentence) as raised:
        blocks_of(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_an_empty_dataset_is_refused_although_its_reader_raises_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UsageError, match="cannot be read: "):
        blocks_of(tmp_path / "empty.jsonl")


def test_a_dataset_without_a_tokenizer_for_a_pretrained_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "corpus.txt", [TEXT])
    with pytest.raises(UsageError, match=r"no tokenizer for `dataset`: .* \(name one with `tokenizer`\)"):
        blocks_of(tmp_path / "corpus.txt", tokenizer=str(tmp_path / "nowhere"))


def numbered(count: int) -> datasets.Dataset:
    """Blocks that can be told apart: block n is n, eight times."""
    return datasets.Dataset.from_dict({"input_ids": [[n] * 8 for n in range(count)]}).with_format("torch")


def drawn(blocks: datasets.Dataset, micro_batches: int, *, rank: int, ranks: int = 2, size: int = 2) -> list[int]:
    """The numbers of the blocks in the first micro-batches of a rank."""
    stream = itertools.islice(batches(blocks, size, rank=rank, ranks=ranks, pin=False), micro_batches)
    return [number for batch in stream for number in batch["input_ids"][:, 0].tolist()]


def test_a_micro_batch_is_ids_and_the_same_ids_as_labels() -> None:
    batch = next(batches(numbered(8), 2, rank=0, ranks=2, pin=False))
    assert batch["input_ids"].shape == (2, 8)
    assert batch["labels"].tolist() == batch["input_ids"].tolist()
    assert batch["labels"].data_ptr() != batch["input_ids"].data_ptr()


def test_ranks_draw_different_blocks() -> None:
    first, second = (drawn(numbered(16), 4, rank=rank) for rank in range(2))
    assert sorted(first + second) == list(range(16))


def test_the_stream_starts_over_in_another_order() -> None:
    epochs = drawn(numbered(16), 8, rank=0)
    assert len(epochs) == 16
    assert epochs[:8] != epochs[8:]


@pytest.mark.parametrize("count", [1, 3, 7])
def test_fewer_blocks_than_a_global_micro_batch_are_used_several_times(count: int) -> None:
    assert len(drawn(numbered(count), 3, rank=1, ranks=4, size=4)) == 12
