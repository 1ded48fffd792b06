"""Files that `dataset` names on this disk, and who reads them: by their names alone, without opening data."""

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ds_tune.objectives.errors import UsageError

DATASET_LOADERS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""File endings and the builder of the `datasets` library that reads them."""

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
"""Endings that may follow these."""

SAVED = "saved"
"""In the place of a builder: a folder that `save_to_disk` wrote."""

DESCRIPTIONS = {
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "cache.json",
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
    "requirements.txt", "license.txt", "readme.txt",
}  # fmt: skip
"""Files of a folder that say something of the data or lie beside it, in lower case."""

_TRAIN = re.compile(r"(^|[^a-z])train(ing)?([^a-z]|$)")
"""In a file's path, as `datasets` tells the split; see its `data_files.py`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFiles:
    """Files of one kind."""

    builder: str
    """Name of the builder of `datasets` that reads them, or `SAVED`."""
    files: Sequence[str]
    """Absolute paths by the names that were given: what a link points to may have no ending."""
    split: str = ""
    """Split that they are, in words; empty where there is no choice of splits."""

    @property
    def options(self) -> Mapping[str, str]:
        """Options of the builder."""
        return {"sep": "\t"} if _is_tabbed(Path(self.files[0])) else {}

    @property
    def is_empty(self) -> bool:
        """Whether there is not a byte in them."""
        if self.builder == SAVED:  # a dataset without rows is saved without such a file
            return not any(Path(self.files[0]).glob("*.arrow"))
        return all(os.stat(file).st_size == 0 for file in self.files)


def dataset_files(pattern: str) -> DatasetFiles:
    """The files that a local `dataset` names: a file, a folder or a glob.

    A folder is one of `save_to_disk`, or has its files in it, or below it: of these the train split where names tell.

    Raises:
        UsageError: nothing is there, or the files are of no kind, or of several.
    """
    path = Path(pattern)
    split = ""
    if path.is_dir():
        if (saved := _saved(path)) is not None:
            return saved
        files = [file for file in _visible(path.iterdir()) if _ending(file)]
        files = files or [file for file in _visible(path.rglob("*")) if _ending(file)]
        train = [file for file in files if _TRAIN.search(str(file.relative_to(path)).lower())]
        if train and len(train) < len(files):
            files, split = train, "the train split"
    elif path.is_file():
        files = [path]
    else:
        anchor = Path(path.anchor or ".")
        files = sorted(anchor.glob(str(path.relative_to(path.anchor) if path.anchor else path)))
    if not files:
        if path.is_dir():
            raise UsageError(f"`dataset={pattern}`: the folder has no {_kinds()} file, and is none of save_to_disk")
        raise UsageError(f"`dataset={pattern}`: no such file, and no hub id (owner/name) either")
    readers = {(_builder(file), _is_tabbed(file)) for file in files}
    if len(readers) > 1 or _builder(files[0]) == "":
        found = sorted({_ending(file) or file.suffix or "no ending" for file in files})
        raise UsageError(f"`dataset={pattern}`: files must be all of one kind of {_kinds()} (found {', '.join(found)})")
    return DatasetFiles(builder=_builder(files[0]), files=[os.path.abspath(file) for file in files], split=split)


def _kinds() -> str:
    return ", ".join(DATASET_LOADERS)


def _visible(files: Iterator[Path]) -> list[Path]:
    """Files, in order, that are neither hidden nor descriptions of what is in others."""
    return sorted(
        file
        for file in files
        if file.is_file() and not file.name.startswith((".", "_")) and file.name.lower() not in DESCRIPTIONS
    )


def _ending(file: Path) -> str | None:
    """The ending that says the kind; None where it says none."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        del suffixes[-1]
    return suffixes[-1] if suffixes and suffixes[-1] in DATASET_LOADERS else None


def _builder(file: Path) -> str:
    ending = _ending(file)
    return "" if ending is None else DATASET_LOADERS[ending]


def _is_tabbed(file: Path) -> bool:
    return _ending(file) == ".tsv"


def _saved(folder: Path) -> DatasetFiles | None:
    """What `save_to_disk` wrote into a folder: a dataset, or one of several splits. None where it wrote neither.

    Raises:
        UsageError: none of the splits is the one to train on.
    """
    if (folder / "dataset_dict.json").is_file():
        try:
            splits = list(json.loads((folder / "dataset_dict.json").read_text())["splits"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"`dataset={folder}`: its dataset_dict.json cannot be read; save it again") from error
        split = splits[0] if len(splits) == 1 else "train"
        if split not in splits:
            raise UsageError(
                f"`dataset={folder}` has the splits {', '.join(splits)} and none is train; name the folder of one"
            )
        return DatasetFiles(builder=SAVED, files=[os.path.abspath(folder / split)], split=f"the {split} split")
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return DatasetFiles(builder=SAVED, files=[os.path.abspath(folder)])
    return None
