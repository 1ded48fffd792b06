"""A results folder belongs to one study in one storage, however the two are written and wherever the folder goes."""

import json
from pathlib import Path

import pytest

from ds_tune.objectives.errors import UsageError
from ds_tune.storage.layout import ResultsFolder
from ds_tune.storage.ownership import check_owner, claim, storage_place


@pytest.fixture
def folder(tmp_path: Path) -> ResultsFolder:
    (tmp_path / "results").mkdir()
    return ResultsFolder(tmp_path / "results")


def test_a_study_comes_back_to_its_folder(folder: ResultsFolder) -> None:
    for _ in range(2):
        claim(folder, "study", folder.storage_url)
    assert json.loads(folder.owner.read_text()) == {"study": "study", "storage": "study.db"}


def test_a_folder_that_was_moved_with_its_database_goes_on(folder: ResultsFolder, tmp_path: Path) -> None:
    claim(folder, "study", folder.storage_url)
    moved = ResultsFolder(folder.root.rename(tmp_path / "moved"))
    check_owner(moved, "study", moved.storage_url)


def test_every_path_to_a_database_is_one_storage(
    folder: ResultsFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    claim(folder, "study", "sqlite:///a.db")
    for path in ("./a.db", f"{tmp_path}/a.db", "link/a.db"):
        check_owner(ResultsFolder(Path("link/results")), "study", f"sqlite:///{path}")
    check_owner(folder, "study", f"sqlite:///{tmp_path}/results/../a.db")


def test_a_server_is_named_without_secrets_and_however_it_is_reached(folder: ResultsFolder) -> None:
    place = storage_place(folder, "postgresql+psycopg2://me:hunter2@host:5432/db?sslpassword=swordfish&sslmode=require")
    assert place == "postgresql://host:5432/db"
    assert place == storage_place(folder, "postgresql://you:changed@host:5432/db")
    socket = storage_place(folder, "postgresql://me:hunter2@/db?host=/run/postgresql")
    assert "/run/postgresql" in socket.replace("%2F", "/")
    assert len({place, socket, storage_place(folder, "postgresql://me@host:5432/other")}) == 3


def test_a_study_of_the_same_name_in_another_storage_is_refused(folder: ResultsFolder, tmp_path: Path) -> None:
    claim(folder, "ds-tune", f"sqlite:///{tmp_path}/a.db")
    before = folder.owner.read_text()
    for other in (f"sqlite:///{tmp_path}/b.db", folder.storage_url, "postgresql://me:hunter2@host/db"):
        with pytest.raises(UsageError) as refused:
            claim(folder, "ds-tune", other)
        assert str(refused.value) == (
            f"`results={folder.root}` holds the results of study ds-tune in sqlite:///{tmp_path}/a.db; "
            f"give this one a folder of its own, such as `results={folder.root}-2`"
        )
    assert folder.owner.read_text() == before


def test_the_folders_own_database_is_named_by_its_path(folder: ResultsFolder) -> None:
    claim(folder, "ds-tune", folder.storage_url)
    with pytest.raises(
        UsageError, match=f"^`out={folder.root}` holds .* study ds-tune in {folder.root}/study.db; give"
    ):
        check_owner(folder, "ds-tune", "postgresql://me@host/db", field="out")


def test_a_study_of_another_name_in_the_same_storage_is_refused(folder: ResultsFolder) -> None:
    claim(folder, "first", folder.storage_url)
    with pytest.raises(UsageError, match=f"holds the results of study first; give .* `results={folder.root}-second`$"):
        claim(folder, "second", folder.storage_url)


@pytest.mark.parametrize("url", ["sqlite:///{}/a.db", "postgresql://me@host/db"])
def test_a_folder_from_before_storages_were_recorded_goes_on_and_records_it(folder: ResultsFolder, url: str) -> None:
    url = url.format(folder.root.parent)
    folder.owner.write_text('{"study": "study"}\n')
    claim(folder, "study", url)
    assert json.loads(folder.owner.read_text())["storage"] == storage_place(folder, url)


def test_a_database_in_a_folder_from_before_is_its_owners(folder: ResultsFolder) -> None:
    folder.owner.write_text('{"study": "study"}\n')
    folder.database.touch()
    check_owner(folder, "study", folder.storage_url)
    with pytest.raises(UsageError, match=r"holds the results of study study in .*/results/study\.db; "):
        check_owner(folder, "study", "postgresql://me@host/db")


@pytest.mark.parametrize("text", ["", "[]", "7", '{"name": "mine"}', "not JSON"])
def test_somebody_elses_study_json_is_left_alone(folder: ResultsFolder, text: str) -> None:
    folder.owner.write_text(text)
    with pytest.raises(UsageError, match=r"has a study\.json that is not ds-tune's; name another folder$"):
        claim(folder, "study", folder.storage_url)
    assert folder.owner.read_text() == text


def test_a_study_json_that_cannot_be_read_is_not_ours_either(folder: ResultsFolder) -> None:
    folder.owner.mkdir()
    with pytest.raises(UsageError, match="that is not ds-tune's"):
        check_owner(folder, "study", folder.storage_url)
