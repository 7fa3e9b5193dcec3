"""Divide the tasks of a stage among ranks, and keep each result as a file that appears when it is whole."""

import errno
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigurationError, ReadingStopped, RunStopped, StorageFailed
from common.files import beside
from common.progress import beat
from data.ranks import Ranks

Made = Callable[[int, Path], None]
KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ConfigurationError, StorageFailed, RunStopped, ReadingStopped)
}


def each(ranks: Ranks, stage: str, paths: Sequence[Path], make: Made) -> None:
    """Make every file of `paths` that is not there, by `make(task, partial path)`. A collective of `ranks`.

    A rank makes each `size`-th file. An error of one rank is raised on all of them, when each has come to its end.
    """
    own = range(ranks.rank, len(paths), ranks.size)
    start, printed, failed = time.monotonic(), 0, None
    try:
        for done, task in enumerate(own, 1):
            if not paths[task].exists():
                beat(f"{stage} {task}")
                with beside(paths[task], durable=True) as partial:
                    make(task, partial)
            if ranks.rank == 0 and sys.stdout and 10 * done // len(own) > printed:
                printed = 10 * done // len(own)
                print(
                    f"{stage}: {done:,} of {len(own):,} tasks of rank 0, {time.monotonic() - start:.0f} s", flush=True
                )
    except (ConfigurationError, ReadingStopped, RunStopped) as error:
        failed = next(name for name, kind in KINDS.items() if isinstance(error, kind)), str(error)
    except OSError as error:
        failed = "RunStopped", _disk(error)
    together(ranks, failed)


def together(ranks: Ranks, failed: tuple[str, str] | None) -> None:
    """Raise the error of the lowest rank that has one, on all ranks. A collective of `ranks`."""
    every = [failed] if ranks.world is None else ranks.world.allgather(failed)
    for found in every:
        if found is not None:
            kind, message = found
            raise KINDS[kind](message)


def write_slices(path: Path, array: NDArray[Any], bounds: NDArray[np.int64]) -> None:
    """Write an array with the bounds of its slices, so that one slice can be read without the others."""
    with open(path, "wb") as file:
        np.concatenate([[len(bounds)], bounds]).astype("<u8").tofile(file)
        array.tofile(file)


def read_slice(path: Path, number: int, kind: np.dtype[Any]) -> NDArray[Any]:
    """Return slice `number` of an array that `write_slices` wrote."""
    with open(path, "rb") as file:
        (count,) = np.fromfile(file, "<u8", 1)
        file.seek(8 * (1 + number))
        first, last = map(int, np.fromfile(file, "<u8", 2))
        file.seek(8 * (1 + int(count)) + first * kind.itemsize)
        return np.fromfile(file, kind, last - first)


def _disk(error: OSError) -> str:
    where = error.filename or "a file"
    if error.errno == errno.ENOSPC:
        return f"{where} cannot be written (no space left); make room and start the same command again."
    return f"{where}: {error.strerror or error}; correct it and start the same command again."


def remove_partial(folder: Path) -> None:
    """Remove partial files that a killed build left behind."""
    for found in folder.rglob("*.partial"):
        os.unlink(found)
