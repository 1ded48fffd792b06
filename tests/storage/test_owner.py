"""A results folder is one study's."""

import json
from pathlib import Path

import pytest

from objectives.errors import UsageError
from storage.layout import ResultsFolder
from storage.owner import check, claim


@pytest.fixture
def folder(tmp_path: Path) -> ResultsFolder:
    (tmp_path / "results").mkdir()
    return ResultsFolder(tmp_path / "results")


def test_it_is_nobody_s_before_it_is_claimed_and_then_one_study_s(folder: ResultsFolder) -> None:
    assert not check(folder, "s", folder.storage_url)
    for _ in range(2):
        claim(folder, "s", folder.storage_url)
    assert check(folder, "s", folder.storage_url)
    with pytest.raises(UsageError, match=f"--results {folder.root} holds the results of study s; give this one a "):
        claim(folder, "t", folder.storage_url)


def test_studies_of_one_name_are_told_apart_by_where_they_are_kept(folder: ResultsFolder, tmp_path: Path) -> None:
    claim(folder, "s", f"sqlite:///{tmp_path}/a.db")
    assert check(folder, "s", f"sqlite:///{tmp_path}/results/../a.db")
    with pytest.raises(UsageError, match=rf"another study s, which is kept in {tmp_path}/a.db; .*--out .*-2$"):
        check(folder, "s", folder.storage_url, option="--out")


def test_a_folder_with_its_study_may_be_moved(folder: ResultsFolder, tmp_path: Path) -> None:
    claim(folder, "s", folder.storage_url)
    moved = ResultsFolder(folder.root.rename(tmp_path / "elsewhere"))
    assert check(moved, "s", moved.storage_url)


def test_a_server_s_password_is_not_written_down(folder: ResultsFolder) -> None:
    claim(folder, "s", "postgresql://me:hunter2@host/db")
    assert json.loads(folder.owner.read_text()) == {"study": "s", "storage": "postgresql://me:***@host/db"}


def test_a_folder_of_an_earlier_version_does_not_say_where_its_study_is(folder: ResultsFolder) -> None:
    folder.owner.write_text(json.dumps({"study": "s"}))
    assert check(folder, "s", folder.storage_url)


@pytest.mark.parametrize("content", ["", "[]", "{}", None])
def test_what_is_not_ours_is_left_alone(folder: ResultsFolder, content: str | None) -> None:
    if content is None:
        folder.owner.mkdir()
    else:
        folder.owner.write_text(content)
    with pytest.raises(UsageError, match=r"has a study\.json that is not ds-tune's; name another folder"):
        claim(folder, "s", folder.storage_url)
