"""Samples of datasets in every file format, and what is refused of them."""

import bz2
import csv
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.rank.dataset import open_samples

Rows = Sequence[Mapping[str, Any]]

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hó"}]
ROWS: dict[str, Rows] = {
    "text": [{"text": "one", "n": 1}, {"text": "zwö", "n": 2}],
    "other": [{"content": "one", "n": 1}, {"content": "two", "n": 2}],
    "chat": [{"messages": CHAT}, {"messages": CHAT[:1]}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hó"}]}] * 2,
    "pairs": [{"instruction": "a", "input": "", "output": "c"}, {"instruction": "a", "input": "b", "output": "c"}],
    "preferences": [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2,
}
SAMPLES: dict[str, list[Any]] = {
    "text": ["one", "zwö"],
    "other": ["one", "two"],
    "chat": [CHAT, CHAT[:1]],
    "sharegpt": [CHAT, CHAT],
    "pairs": ["a\n\nc", "a\n\nb\n\nc"],
    "preferences": ["a\n\nb", "a\n\nb"],
}


def lines(rows: Rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_csv(path: Path, rows: Rows, delimiter: str = ",") -> None:
    """Cells that are no plain values as JSON: a CSV file has no other way."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow(value if isinstance(value, str | int) else json.dumps(value) for value in row.values())


def frame(rows: Rows) -> datasets.Dataset:
    return datasets.Dataset.from_list([dict(row) for row in rows])


def write_arrow(path: Path, rows: Rows) -> None:
    frame(rows).save_to_disk(path.with_suffix(""))
    next(path.with_suffix("").glob("*.arrow")).rename(path)


FORMATS: dict[str, Callable[[Path, Rows], Any]] = {
    "d.jsonl": lambda path, rows: path.write_text(lines(rows)),
    "d.json": lambda path, rows: path.write_text(json.dumps(list(rows))),
    "d.csv": write_csv,
    "d.tsv": lambda path, rows: write_csv(path, rows, "\t"),
    "d.parquet": lambda path, rows: frame(rows).to_parquet(path),
    "d.arrow": write_arrow,
    "d.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows).encode())),
    "d.jsonl.bz2": lambda path, rows: path.write_bytes(bz2.compress(lines(rows).encode())),
    "saved": lambda path, rows: frame(rows).save_to_disk(path),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ROWS)
def test_samples_are_the_same_in_every_format(tmp_path: Path, kind: str, name: str) -> None:
    FORMATS[name](tmp_path / name, ROWS[kind])
    samples = open_samples(str(tmp_path / name), None)
    # Where a file format has one set of keys for all, those that a message lacks come back as nothing.
    assert list(samples) == SAMPLES[kind]


@pytest.mark.parametrize("name", ["d.csv.gz", "d.parquet.gz", "d.arrow.gz", "d.txt.gz"])
def test_compressed_files_are_read_like_others(tmp_path: Path, name: str) -> None:
    plain = tmp_path / name.removesuffix(".gz")
    if plain.suffix == ".txt":
        plain.write_text("one\nzwö\n")
    else:
        FORMATS[plain.name](plain, ROWS["text"])
    (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
    assert list(open_samples(str(tmp_path / name), None)) == SAMPLES["text"]


def test_snapshot_of_links_to_blobs_is_read_by_its_names(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "77aa"
    blob.parent.mkdir()
    frame(ROWS["text"]).to_parquet(blob)
    link = tmp_path / "snapshot" / "data" / "train-00000-of-00001.parquet"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    (link.parent / "test-00000-of-00001.parquet").symlink_to(blob)
    samples = open_samples(str(tmp_path / "snapshot"), None)
    assert (list(samples), samples.split) == (SAMPLES["text"], "the train split")


def test_split_of_a_saved_dict_is_said(tmp_path: Path) -> None:
    datasets.DatasetDict({"test": frame(ROWS["other"]), "train": frame(ROWS["text"])}).save_to_disk(tmp_path / "saved")
    samples = open_samples(str(tmp_path / "saved"), None)
    assert (list(samples), samples.split) == (SAMPLES["text"], "the train split")


def test_messages_whose_content_is_text_here_and_parts_there_are_read(tmp_path: Path) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    (tmp_path / "d.jsonl").write_text(lines([{"messages": CHAT[:1]}, {"messages": parts}]))
    assert list(open_samples(str(tmp_path / "d.jsonl"), None)) == [CHAT[:1], CHAT[:1]]


def test_column_is_known_by_its_first_value_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(
        lines([{"messages": None, "n": 1}, {"messages": [], "n": 1}, {"messages": CHAT, "n": 2}])
    )
    assert list(open_samples(str(tmp_path / "d.jsonl"), None)) == [[], [], CHAT]


def test_row_of_another_kind_than_the_first_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(lines([{"text": "a"}, {"text": {"b": 1}}]))
    with pytest.raises(UsageError, match=r"^`dataset=.*`: in row 2 column text is an object of b, not text$"):
        list(open_samples(str(tmp_path / "d.jsonl"), None))


@pytest.mark.parametrize(
    ("name", "content"),
    [("d.jsonl", b"\n"), ("d.json", b"[]"), ("d.csv", b"text\n"), ("d.txt.gz", gzip.compress(b"", mtime=0))],
)
def test_file_without_a_row_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=r"^`dataset=.*` (has no rows$|cannot be read: )"):
        open_samples(str(tmp_path / name), None)


def test_text_in_another_encoding_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_bytes("Häfen".encode("latin-1"))
    with pytest.raises(UsageError, match=r"cannot be read: 'utf-8' codec .*; save it as UTF-8$"):
        open_samples(str(tmp_path / "d.txt"), None)


def test_saved_dataset_without_a_row_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UsageError, match=r"has no rows$"):
        open_samples(str(tmp_path / "saved"), None)
