"""One tuner a study."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ds_tune.objectives.errors import EnvironmentFault, UsageError
from ds_tune.storage.lock import StudyLock, lock_file

HOLDER = """
import sys, time
from ds_tune.storage.lock import StudyLock
with StudyLock(sys.argv[1], "study"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/study.db"


def test_a_second_tuner_is_refused_and_told_which_process_has_the_study(url: str) -> None:
    with (
        StudyLock(url, "study"),
        pytest.raises(UsageError, match=rf"another tuner \(process {os.getpid()}\) is working on study study; wait"),
        StudyLock(url, "study"),
    ):
        pass


def test_the_lock_is_given_back(url: str) -> None:
    for _ in range(2):
        with StudyLock(url, "study"):
            pass


def test_the_lock_is_gone_with_a_holder_that_was_killed(url: str) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, url], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=f"process {holder.pid}"), StudyLock(url, "study"):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with StudyLock(url, "study"):
        pass


def test_studies_of_one_database_do_not_wait_for_each_other(url: str) -> None:
    with StudyLock(url, "one"), StudyLock(url, "another"):
        pass


def test_every_path_to_a_database_leads_to_one_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    paths = [f"{tmp_path}/study.db", "study.db", "link/study.db", f"{tmp_path}/link/../{tmp_path.name}/study.db"]
    assert len({lock_file(f"sqlite:///{path}", "study") for path in paths}) == 1


def test_the_lock_of_a_server_is_in_the_temporary_folder_and_hides_the_password() -> None:
    lock = lock_file("postgresql://me:hunter2@host/db", "study")
    assert lock.parent == Path(os.environ.get("TMPDIR", "/tmp"))
    assert "hunter2" not in lock.name
    assert lock == lock_file("postgresql://me:changed@host/db", "study")
    assert lock != lock_file("postgresql://me:hunter2@host/other", "study")


def test_a_lock_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError) as refused, StudyLock("sqlite:////proc/x.db", "study"):
        pass
    assert str(refused.value) == (
        "`storage=sqlite:////proc/x.db`: the folder /proc cannot be written to (No such file or directory); "
        "name a file elsewhere"
    )
    monkeypatch.setattr(tempfile, "tempdir", f"{tmp_path}/gone")
    with pytest.raises(
        EnvironmentFault, match=f"folder {tmp_path}/gone cannot be written to .*; set TMPDIR to another"
    ):
        StudyLock("postgresql://me:hunter2@host/db", "study").__enter__()
