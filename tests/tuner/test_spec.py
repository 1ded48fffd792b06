"""Sizes of memory and the results folder, checked before anything runs."""

import os
from pathlib import Path

import pytest

from ds_tune.objectives.errors import UsageError
from ds_tune.tuner.request import parse_memory
from ds_tune.tuner.spec import results_folder


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("24", 24 * 2**30),
        ("24g", 24 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("512MiB", 512 * 2**20),
        ("512mb", 512 * 10**6),
        (" 8G ", 8 * 2**30),
    ],
)
def test_sizes_are_read_with_their_units_and_without_one_in_gib(text: str, size: int) -> None:
    assert parse_memory(text) == size


def test_the_smallest_size_is_a_byte() -> None:
    assert parse_memory("0.000001MB") == 1


@pytest.mark.parametrize(
    "text",
    [
        "", "0", "0GiB", "-1GiB", "24TB", "much", "GiB", "1e3", "24 GiB a rank", "nan",
        "0.0000001M", "0.0000009MB", "0.0000000000001", pytest.param("9" * 400, id="400 nines"),
    ],
)  # fmt: skip
def test_malformed_memory_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="write a size such as 24GiB or 512MiB"):
        parse_memory(text)


def test_a_results_folder_is_made(tmp_path: Path) -> None:
    folder = results_folder(tmp_path / "a" / "b")
    assert folder.root.is_dir()
    assert list(folder.root.iterdir()) == []


def test_a_file_is_no_results_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"`results=.*file` cannot be written to \(File exists\); name another folder"):
        results_folder(tmp_path / "file")
    with pytest.raises(UsageError, match="cannot be written to"):
        results_folder(tmp_path / "file" / "below")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match=r"cannot be written to \(Permission denied\)"):
        results_folder(tmp_path)
