"""Lock a run's folder, because two jobs that write the same checkpoints would destroy both runs."""

import errno
import fcntl
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO

from common.errors import Notice
from train.run.owner_file import BEAT_S, STALE_S, OwnerFile

WAIT_S = 60.0  # a job saves after a stop signal, and the next one may start before that is done
POLL_S = 0.5
# Errors of a file system without locks, such as Lustre without `-o flock`.
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


class FolderLock:
    """Lock a folder on the main rank; the kernel releases the lock when the process ends, however it ends.

    On a file system without locks, a file is used instead (`OwnerFile`), and a warning states the consequences.
    """

    def __init__(self, folder: Path, wait_s: float = WAIT_S) -> None:
        """Lock nothing yet. `wait_s`: the longest wait for another job."""
        self.path, self.wait_s = folder / "lock", wait_s
        self.file: IO[str] | None = None
        self.owner_file: OwnerFile | None = None

    def take(self) -> str | None:
        """Wait for the folder; return None once it is locked, else the name of the process that still holds it.

        Raises OSError, with the lock's path, where the disk fails, is full or cannot be written to.
        """
        self.file = self.path.open("a+", encoding="utf-8")
        try:
            return self._wait(self._locked_by, min(WAIT_S, self.wait_s))
        except OSError as error:
            self.release()
            if error.errno not in NO_LOCKS:
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            return self._take_owner_file(error)

    def release(self) -> None:
        """Release the folder at the end of the run."""
        if self.file is not None:
            self.file.close()
        if self.owner_file is not None:
            self.owner_file.release()

    def _take_owner_file(self, error: OSError) -> str | None:
        self.owner_file = OwnerFile(self.path.with_name("lock.owner"), own_name())
        warnings.warn(
            Notice(
                f"{self.path.parent} is on a file system without locks ({error.strerror}), so {self.owner_file.path} "
                f"is used instead: a killed job holds the folder for {STALE_S:.0f} s; start no two jobs there within a "
                "second of each other."
            ),
            stacklevel=2,
        )
        return self._wait(self.owner_file.take, min(STALE_S + BEAT_S, self.wait_s))

    def _wait(self, find_holder: Callable[[], str | None], most_s: float) -> str | None:
        """Call `find_holder` until it returns None, at most for `most_s` seconds; return its last result."""
        begun, printed = time.monotonic(), False
        while (holder := find_holder()) is not None and time.monotonic() <= begun + most_s:
            if not printed:
                waiting = f"{self.path.parent} is in use by {holder}; waiting up to {most_s:.0f} s for it."
                print(waiting, file=sys.stderr, flush=True)
                printed = True
            time.sleep(min(POLL_S, most_s))
        return holder

    def _locked_by(self) -> str | None:
        """Lock the folder if it is free and return None, else return the name of its holder."""
        assert self.file is not None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            return self.file.read().strip() or "another process"
        self.file.truncate(0)
        self.file.write(f"{own_name()}\n")
        self.file.flush()
        return None


def own_name() -> str:
    """Return the name of this process, for the messages of other jobs."""
    return f"process {os.getpid()} on {socket.gethostname()}{job_suffix()}"


def job_suffix() -> str:
    """Return the Slurm job of this process, in words; a restarted job keeps its name. Empty outside Slurm."""
    job = os.environ.get("SLURM_JOB_ID")
    return f" of Slurm job {job}" if job else ""
