"""Files that a dataset's name stands for: by endings, in folders, through links."""

import json
from pathlib import Path

import datasets
import pytest

from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.workload.dataset_files import COMPRESSIONS, DATASET_LOADERS, SAVED, dataset_files


def made(path: Path) -> Path:
    """An empty file, with the folders that lead to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.mark.parametrize("compression", ["", *COMPRESSIONS])
@pytest.mark.parametrize("ending", DATASET_LOADERS)
def test_ending_chooses_the_reader_whatever_compressed_it(tmp_path: Path, ending: str, compression: str) -> None:
    for name in (f"part-0{ending}{compression}", f"v1.2{ending}{compression}".upper()):
        file = made(tmp_path / name)
        found = dataset_files(str(file))
        assert (found.builder, found.files) == (DATASET_LOADERS[ending], [str(file)])
        assert found.options == ({"sep": "\t"} if ending == ".tsv" else {})


def test_dataset_may_be_a_file_a_folder_or_a_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [made(tmp_path / "data" / f"part-{number}.txt") for number in range(2)]
    made(tmp_path / "data" / "README.md")
    monkeypatch.chdir(tmp_path)
    assert dataset_files("data/part-0.txt").files == [str(files[0])]
    for name in ("data", "data/*.txt", str(tmp_path / "*" / "*.txt")):
        assert dataset_files(name).files == [str(file) for file in files]


def test_link_is_read_by_its_own_name_and_not_by_what_it_leads_to(tmp_path: Path) -> None:
    blob = made(tmp_path / "blobs" / "77aa")
    link = tmp_path / "snapshots" / "r" / "data" / "train-00000-of-00001.parquet"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    for name in (link, link.parent, tmp_path / "snapshots" / "r", link.parent / "*.parquet"):
        found = dataset_files(str(name))
        assert (found.builder, found.files) == ("parquet", [str(link)]), name


def test_folder_without_data_in_it_is_looked_through_and_its_train_split_is_taken(tmp_path: Path) -> None:
    train = [made(tmp_path / "data" / f"train-0000{number}-of-00002.parquet") for number in range(2)]
    made(tmp_path / "data" / "test-00000-of-00001.parquet")
    made(tmp_path / "README.md")
    made(tmp_path / "dataset_infos.json")
    found = dataset_files(str(tmp_path))
    assert (found.files, found.split) == ([str(file) for file in train], "the train split")


def test_folder_named_for_a_split_has_that_split(tmp_path: Path) -> None:
    train, _ = made(tmp_path / "train" / "0.jsonl"), made(tmp_path / "validation" / "0.jsonl")
    assert dataset_files(str(tmp_path)).files == [str(train)]


def test_training_in_the_middle_of_a_word_is_no_split(tmp_path: Path) -> None:
    files = [made(tmp_path / name) for name in ("constraints.txt", "strainer.txt")]
    found = dataset_files(str(tmp_path))
    assert (found.files, found.split) == ([str(file) for file in files], "")


def test_hidden_files_and_descriptions_of_a_folder_are_no_data(tmp_path: Path) -> None:
    data = made(tmp_path / "train.parquet")
    for name in ("dataset_info.json", ".cache.json", "_SUCCESS.txt", "README.txt"):
        made(tmp_path / name)
    assert dataset_files(str(tmp_path)).files == [str(data)]


def test_saved_dataset_is_its_folder_and_a_saved_dict_its_train_split(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": rows, "train": rows}).save_to_disk(tmp_path / "several")
    datasets.DatasetDict({"corpus": rows}).save_to_disk(tmp_path / "only")
    one, several, only = (dataset_files(str(tmp_path / name)) for name in ("one", "several", "only"))
    assert (one.builder, one.files, one.split) == (SAVED, [str(tmp_path / "one")], "")
    assert (several.files, several.split) == ([str(tmp_path / "several" / "train")], "the train split")
    assert (only.files, only.split) == ([str(tmp_path / "only" / "corpus")], "the corpus split")


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"a.txt": "", "b.csv": ""}, r"all of one kind of .* \(found \.csv, \.txt\)$"),
        ({"a.csv": "", "b.tsv": ""}, r"all of one kind of .* \(found \.csv, \.tsv\)$"),
        ({"a.docx": ""}, r"the folder has no \.txt, .* file, and is none of save_to_disk$"),
        ({"dataset_dict.json": json.dumps({"splits": ["dev", "test"]})}, "has the splits dev, test and none is train;"),
        ({"dataset_dict.json": "{"}, "dataset_dict.json cannot be read; save it again$"),
    ],
)
def test_folder_that_is_no_dataset_is_refused(tmp_path: Path, files: dict[str, str], sentence: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=sentence):
        dataset_files(str(tmp_path))


@pytest.mark.parametrize("name", ["a.docx", "blob", "a.gz"])
def test_file_without_a_known_ending_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="all of one kind"):
        dataset_files(str(made(tmp_path / name)))
