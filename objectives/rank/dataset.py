"""The dataset of a workload: its rows, as the `datasets` library reads them, and the samples that are made of them.

Without torch, which nothing here needs: the tuner has a look at the data before it starts any rank.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import datasets

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.rank.reading import Reading, Sample, reading_of
from ds_tune.objectives.rank.values import UnfitError
from ds_tune.objectives.workload.dataset_files import SAVED, dataset_files

LOOKED_AT = 100
"""Rows whose values say what a column holds: the first of them may be empty."""

COMPRESSED_FIRST = ("parquet", "arrow")
"""Builders of `datasets` that do not decompress what they read."""


@dataclasses.dataclass(frozen=True, slots=True)
class Samples:
    """Samples of a dataset, in its order."""

    name: str
    rows: datasets.Dataset
    reading: Reading
    split: str = ""
    """Split that they are, in words; empty where there was no choice."""

    def __iter__(self) -> Iterator[Sample]:
        """
        Raises:
            UsageError: a row is of another kind than the first.
        """
        for number, row in enumerate(self.rows.select_columns(list(self.reading.columns)), start=1):
            try:
                yield self.reading.sample(row)
            except UnfitError as error:
                raise UsageError(f"`dataset={self.name}`: in row {number} {error}") from error


def open_samples(name: str, text_column: str | None) -> Samples:
    """
    Args:
        name: files, a folder or a glob, or a hub id.
        text_column: column that the user named.

    Raises:
        UsageError: it cannot be read, or it is not clear what to train on.
    """
    rows, split = _open(name)
    if not len(rows):
        raise UsageError(f"`dataset={name}` has no rows")
    return Samples(name, rows, reading_of(name, _first_values(rows), text_column), split)


def _open(name: str) -> tuple[datasets.Dataset, str]:
    """Rows of a dataset, and which split they are where there is a choice."""
    try:
        try:
            found = dataset_files(name)
        except UsageError:  # not on this disk: a hub id, as `check_workload` has seen
            return datasets.load_dataset(name, split="train"), "the train split"
        if found.builder == SAVED:
            if found.is_empty:
                return datasets.Dataset.from_dict({}), found.split
            return datasets.load_from_disk(found.files[0]), found.split
        files = list(found.files)
        if found.builder in COMPRESSED_FIRST:
            files = datasets.DownloadManager().extract(files)
        return datasets.load_dataset(found.builder, data_files=files, split="train", **found.options), found.split
    except Exception as error:  # the loaders of many formats raise errors of many libraries
        reason = error.__cause__ or error  # `datasets` wraps the reader's own words
        said = str(reason).strip().splitlines() or [f"{type(reason).__name__} in its reader; is it empty?"]
        if "corresponds to no data" in said[0]:
            raise UsageError(f"`dataset={name}` has no rows") from error
        hint = "; save it as UTF-8" if isinstance(reason, UnicodeDecodeError) else ""
        raise UsageError(f"`dataset={name}` cannot be read: {said[0]}{hint}") from error


def _first_values(rows: datasets.Dataset) -> dict[str, Any]:
    """By column, the first value that is not empty. Images, audio and the like are not decoded: their type is told."""
    few = rows.select(range(min(len(rows), LOOKED_AT)))
    first: dict[str, Any] = {}
    for column in rows.column_names:
        feature = rows.features[column]
        if type(feature).__name__ in ("Image", "Audio", "Video", "Pdf", "Nifti", "Mesh"):
            first[column] = feature
            continue
        values = few.select_columns([column])[:][column]
        first[column] = next((value for value in values if value is not None and value != "" and value != []), None)
    return first
