"""One tuner a study."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
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


def test_a_lock_is_as_open_as_its_database(tmp_path: Path, url: str) -> None:
    (tmp_path / "study.db").touch()
    (tmp_path / "study.db").chmod(0o664)
    before = os.umask(0)
    try:
        with StudyLock(url, "study"):
            assert lock_file(url, "study").stat().st_mode & 0o777 == 0o664
    finally:
        os.umask(before)


def test_a_lock_that_may_only_be_read_is_taken_and_keeps_others_out(url: str) -> None:
    path = lock_file(url, "study")
    path.touch(0o444)
    taking = [sys.executable, "-c", HOLDER.replace("time.sleep(600)", "sys.stdin.read()"), url]
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    with subprocess.Popen([*drop, *taking], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="another tuner"), StudyLock(url, "study"):
            pass


def test_a_lock_of_another_user_is_named_with_what_to_do(url: str) -> None:
    path = lock_file(url, "study")
    path.touch()
    path.chmod(0)
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    ended = subprocess.run([*drop, sys.executable, "-c", HOLDER, url], capture_output=True, text=True, timeout=60)
    assert f"UsageError: the lock {path} is of user " in ended.stderr
    assert "have it removed or made readable while no tuner runs" in ended.stderr


NO_FLOCK = "#define _GNU_SOURCE\n#include <errno.h>\nint flock(int fd, int op) { errno = ENOSYS; return -1; }\n"
NO_LOCKS = (
    NO_FLOCK
    + """
#include <fcntl.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <unistd.h>
static int without(int fd, int op, void *argument) {
  if (op == F_SETLK || op == F_SETLKW) { errno = ENOLCK; return -1; }
  return syscall(SYS_fcntl, fd, op, argument);
}
int fcntl64(int fd, int op, ...) {
  va_list list; va_start(list, op); void *argument = va_arg(list, void *); va_end(list);
  return without(fd, op, argument);
}
int fcntl(int fd, int op, ...) {
  va_list list; va_start(list, op); void *argument = va_arg(list, void *); va_end(list);
  return without(fd, op, argument);
}
"""
)


@pytest.fixture
def without(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """The environment of a program whose file systems have no locks of a kind."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")

    def environment(source: str) -> dict[str, str]:
        (tmp_path / "locks.c").write_text(source)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", "locks.so", "locks.c"], cwd=tmp_path, check=True, timeout=60)
        return {**os.environ, "LD_PRELOAD": str(tmp_path / "locks.so")}

    return environment


def test_without_flock_another_kind_of_lock_keeps_tuners_apart(
    url: str, without: Callable[[str], dict[str, str]]
) -> None:
    hold = [sys.executable, "-c", HOLDER.replace("time.sleep(600)", "sys.stdin.read()"), url]
    environment = without(NO_FLOCK)
    with subprocess.Popen(hold, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        second = subprocess.run(hold, env=environment, capture_output=True, text=True, timeout=60, input="")
        assert f"another tuner (process {holder.pid}) is working on study" in second.stderr


def test_without_any_locks_the_file_is_named_with_what_to_do(
    url: str, without: Callable[[str], dict[str, str]]
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", HOLDER, url], env=without(NO_LOCKS), capture_output=True, text=True, timeout=60
    )
    assert f"{lock_file(url, 'study')} cannot be locked (No locks available)" in ended.stderr
    assert "keep the study on another one, such as `storage=sqlite:////tmp/study.db`" in ended.stderr
