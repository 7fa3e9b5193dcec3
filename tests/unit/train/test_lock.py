"""One job at a time in a folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.lock import FolderLock

HOLDER = """
import sys, time
from pathlib import Path
from train.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
assert lock.take() is None
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_job_is_told_who_holds_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    first, second = FolderLock(tmp_path), FolderLock(tmp_path, wait_s=0.1)
    assert first.take() is None
    assert second.take() == f"process {os.getpid()} on {os.uname().nodename}"
    first.give_back()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    third = FolderLock(tmp_path, wait_s=0.1)
    assert third.take() is None
    assert str(FolderLock(tmp_path, wait_s=0.1).take()).endswith(" of Slurm job 7")


def test_a_job_that_is_killed_holds_nothing(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, encoding="utf-8")
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    assert FolderLock(tmp_path, wait_s=0.1).take() == f"process {holder.pid} on {os.uname().nodename}"
    holder.kill()
    holder.wait()
    assert FolderLock(tmp_path, wait_s=5).take() is None
