"""One job at a time in a run's folder: two that write the same checkpoints would harm both."""

import fcntl
import os
import socket
import sys
import time
from pathlib import Path
from typing import IO

WAIT_S = 60.0  # a job that was told to stop saves first, and the next one may start before it is done


class FolderLock:
    """Held by the first rank; the kernel gives it back when the process ends, however it ends."""

    def __init__(self, folder: Path, wait_s: float = WAIT_S) -> None:
        self.path, self.wait_s = folder / "lock", wait_s
        self.file: IO[str] | None = None

    def take(self) -> str | None:
        """Wait for the folder; None once it is ours, else who still holds it. Without locks there (some network file
        systems) it is ours."""
        self.file = self.path.open("a+", encoding="utf-8")
        begun = time.monotonic()
        said = False
        while True:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.file.seek(0)
                holder = self.file.read().strip() or "another process"
                if time.monotonic() > begun + self.wait_s:
                    return holder
                if not said:
                    waiting = f"{self.path.parent} is in use by {holder}; waiting up to {self.wait_s:.0f} s for it."
                    print(waiting, file=sys.stderr, flush=True)
                    said = True
                time.sleep(0.5)
            except OSError:
                return None
            else:
                self.file.truncate(0)
                self.file.write(f"process {os.getpid()} on {socket.gethostname()}{of_this_job()}\n")
                self.file.flush()
                return None

    def give_back(self) -> None:
        """The run has ended."""
        if self.file is not None:
            self.file.close()


def of_this_job() -> str:
    """Which Slurm job this process belongs to, in words; the restarts of a job are one job."""
    job = os.environ.get("SLURM_JOB_ID")
    return f" of Slurm job {job}" if job else ""
