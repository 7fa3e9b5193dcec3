"""Take a run's folder for this job alone, before any of its files is read or written."""

from pathlib import Path

from common.errors import ConfigurationError, Interrupted
from parallel.layout import Layout
from train.run.lock import FolderLock, job_suffix


def take_folder(folder: Path, layout: Layout, wait_s: float) -> FolderLock:
    """Make the folder and lock it on the main rank; return the lock. A collective of all ranks.

    `wait_s`: the longest wait for another job. Raises ConfigurationError on every rank where another job keeps the
    folder, and Interrupted where it is kept by a process that this job left behind.
    """
    lock = FolderLock(folder, wait_s)
    holder = layout.broadcast_from_main(lambda: _take(folder, lock))
    if holder is not None:
        if job_suffix() and holder.endswith(job_suffix()):  # Slurm may lose a node on which the process lives on
            raise Interrupted(f"{folder} is still in use by {holder}, which is this job; it must start again.")
        raise ConfigurationError(f"{folder} is in use by {holder}; wait for it or end it, or choose another run.name.")
    layout.barrier()
    return lock


def _take(folder: Path, lock: FolderLock) -> str | None:
    """Return None once the folder is locked, else the name of the process that holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return lock.take()
    except FileNotFoundError as error:  # /proc, for example, takes no folders
        raise ConfigurationError(f"{folder} cannot be made; choose another run.folder.") from error
    except KeyboardInterrupt as error:
        raise Interrupted(f"Interrupted while waiting for {folder}; nothing was begun.") from error
