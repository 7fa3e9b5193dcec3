"""Write the reason why a rank stops the whole job, for its job script and torchrun to read.

A rank whose disk is full ends with exit code 3 alone. Its peers lose it and end with 4, or are killed (137), and srun
reports the highest code: without the note, the job would be queued again.
"""

import json
import os
import socket
import time
from contextlib import suppress

from common.errors import ConfigurationError
from common.launcher import this_process

JOB_SCRIPT = "PALI_NOTE"  # variable with the file that slurm/job.sh has filled with blanks
TORCHRUN = "TORCHELASTIC_ERROR_FILE"  # variable with the file of this rank whose message torchrun prints
SIZE = 4096  # bytes of the job script's file: one block, allocated before the disk can be full
FINAL = (2, 3)  # exit codes after which nothing is started again


def leave(code: int, message: str) -> None:
    """Write the exit code and the sentence, if starting again would not help; the note that is written first stays."""
    if code in FINAL:
        text = f"{_who()}: {' '.join(message.split())}"
        if path := os.environ.get(JOB_SCRIPT):
            _fill(path, f"{code}\n{text}\n")
        if (path := os.environ.get(TORCHRUN)) and not text.startswith("rank 0 "):  # rank 0 prints its own
            with suppress(OSError), open(path, "w", encoding="utf-8") as opened:
                json.dump({"message": text, "timestamp": int(time.time())}, opened)


def withdraw() -> None:
    """Blank the job script's note, because a sweep continues with its next run."""
    if path := os.environ.get(JOB_SCRIPT):
        with suppress(OSError):
            _write(path, "")


def _fill(path: str, text: str) -> None:
    try:
        with open(path, encoding="utf-8", errors="replace") as opened:
            if opened.read().strip():
                return
        _write(path, text)
    except OSError:
        with suppress(OSError):
            os.unlink(path)  # needs no room; slurm/job.sh reads the missing file as exit code 3


def _write(path: str, text: str) -> None:
    """Overwrite the file in one write, without changing its size."""
    content = text.encode("utf-8", "replace")[: SIZE - 1].decode("utf-8", "ignore").encode()
    file = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(file, content + b" " * (SIZE - 1 - len(content)) + b"\n", 0)
        os.fsync(file)
    finally:
        os.close(file)


def _who() -> str:
    try:
        return f"rank {this_process().rank} on {socket.gethostname()}"
    except ConfigurationError:
        return f"a process on {socket.gethostname()}"
