"""Only one job at a time holds a folder."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.errors import Notice
from train.run.lock import FolderLock
from train.run.owner_file import STALE_S, OwnerFile

HOLDER = """
import sys, time
from pathlib import Path
from train.run.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
assert lock.take() is None
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_job_gets_the_name_of_the_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    first, second = FolderLock(tmp_path), FolderLock(tmp_path, wait_s=0)
    assert first.take() is None
    assert second.take() == f"process {os.getpid()} on {os.uname().nodename}"
    first.release()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    third = FolderLock(tmp_path, wait_s=0)
    assert third.take() is None
    assert str(FolderLock(tmp_path, wait_s=0).take()).endswith(" of Slurm job 7")


@pytest.mark.parametrize(("free_after_s", "taken"), [(0.4, True), (2.4, True), (3.6, False)])
def test_a_job_waits_for_the_folder_as_long_as_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_after_s: float, taken: bool
) -> None:
    """Uses a simulated clock, on which only sleeping takes time."""
    first, second, now = FolderLock(tmp_path), FolderLock(tmp_path, wait_s=3), [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if now[0] >= 100 + free_after_s:
            first.release()

    monkeypatch.setattr("train.run.lock.time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    assert first.take() is None
    assert (second.take() is None) == taken


def without_locks(code: int) -> Callable[..., None]:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return flock


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_is_used_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr("fcntl.flock", without_locks(code))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    first, second = FolderLock(tmp_path), FolderLock(tmp_path, wait_s=0)
    with pytest.warns(Notice, match=rf"^{tmp_path} is on a file system without locks \(.*holds the folder for 120 s"):
        assert first.take() is None
    with pytest.warns(Notice):
        assert second.take() == f"process {os.getpid()} on {os.uname().nodename} of Slurm job 7"
    second.release()
    assert (tmp_path / "lock.owner").exists(), "the second one does not own it"
    first.release()
    with pytest.warns(Notice):
        assert second.take() is None
    second.release()
    assert not (tmp_path / "lock.owner").exists()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EACCES, errno.ESTALE])
def test_an_error_of_the_disk_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr("fcntl.flock", without_locks(code))
    with pytest.raises(OSError) as failed:
        FolderLock(tmp_path).take()
    assert (failed.value.errno, failed.value.filename) == (code, str(tmp_path / "lock"))


def test_an_owner_that_is_dead_or_silent_is_replaced_by_one_process(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    path = tmp_path / "lock.owner"
    path.write_text(f"process {gone.pid} on here\n{os.uname().nodename} {gone.pid} 0\n", encoding="utf-8")
    first, second = OwnerFile(path, "the first"), OwnerFile(path, "the second")
    assert first.take() is None and second.take() == "the first"
    old = path.stat().st_mtime - STALE_S - 60
    path.write_text("process 1 on n1\nn1 1 0\n", encoding="utf-8")
    assert second.take() == "process 1 on n1"  # of another machine, so it may live
    os.utime(path, (old, old))
    assert second.take() is None and first.take() == "the second"
    first._remove("the text of an older file")
    assert first.take() == "the second", "a newer file is put back"
    assert [file.name for file in tmp_path.iterdir()] == ["lock.owner"]
    first.release()
    second.release()
    assert not path.exists()


def test_a_job_that_is_killed_holds_nothing(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, encoding="utf-8")
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    assert FolderLock(tmp_path, wait_s=0).take() == f"process {holder.pid} on {os.uname().nodename}"
    holder.kill()
    holder.wait()
    assert FolderLock(tmp_path, wait_s=5).take() is None
