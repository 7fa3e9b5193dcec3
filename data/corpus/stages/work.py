"""Divide the tasks of a stage among ranks, and keep each result as a file that appears when it is whole."""

import errno
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigurationError, ReadingStopped, RunStopped, StorageFailed
from common.files import beside
from common.progress import beat
from data.ranks import Ranks

T = TypeVar("T")
Made = Callable[[int, Path], None]
KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ConfigurationError, StorageFailed, RunStopped, ReadingStopped)
}
CAUGHT: tuple[type[Exception], ...] = (*KINDS.values(), OSError)
PARTIAL = re.compile(r"\.([^/]+)\.[0-9a-f]{8}\.partial$")  # see common/files.py
PRINT_S = 10.0  # seconds between two lines of progress


def each(ranks: Ranks, stage: str, paths: Sequence[Path], make: Made, claims: Path) -> None:
    """Make every file of `paths` that is not there, by `make(task, partial path)`. A collective of `ranks`.

    A rank takes a task when it has made the one before, so that no rank waits for a slow part of another. An error of
    one rank is raised on all of them, when each has come to its end.
    """
    start = printed = time.monotonic()
    failed = None
    try:
        for done, task in enumerate(own_tasks(ranks, stage, paths, claims), 1):
            beat(f"{stage} {task}")
            with beside(paths[task], durable=True) as partial:
                make(task, partial)
            if ranks.rank == 0 and sys.stdout and time.monotonic() > printed + PRINT_S:
                printed = time.monotonic()
                print(f"{stage}: {done:,} tasks by rank 0, of {len(paths):,}, {printed - start:.0f} s", flush=True)
    except CAUGHT as error:
        failed = _named(error)
    together(ranks, failed)


def own_tasks(ranks: Ranks, stage: str, paths: Sequence[Path], claims: Path) -> Iterator[int]:
    """Yield the tasks that this rank makes: its own share first, then what the others have not begun.

    A rank claims a task by a file that only one can make; `claims` is empty when a build starts.
    """
    for shift in range(ranks.size):
        for task in range((ranks.rank + shift) % ranks.size, len(paths), ranks.size):
            if not paths[task].exists() and (ranks.world is None or _claim(claims / f"{stage}_{task}")):
                yield task


def first(ranks: Ranks, work: Callable[[], T]) -> T:
    """Call `work` on rank 0; return its result, or raise its error, on all ranks. A collective of `ranks`."""
    failed, result = None, None
    if ranks.rank == 0:
        try:
            result = work()
        except CAUGHT as error:
            failed = _named(error)
    together(ranks, failed)
    return result if ranks.world is None else ranks.world.bcast(result)  # type: ignore[return-value]


def _claim(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _named(error: Exception) -> tuple[str, str]:
    """Return the kind and the sentence of an error, as `together` sends them."""
    if isinstance(error, OSError):
        return "RunStopped", _disk(error)
    return next(name for name, kind in KINDS.items() if isinstance(error, kind)), str(error)


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
        # `tofile` raises an error without a number where the disk is full
        file.write(np.concatenate([[len(bounds)], bounds]).astype("<u8").tobytes())
        file.write(np.ascontiguousarray(array).data)


def read_slice(path: Path, number: int, kind: np.dtype[Any]) -> NDArray[Any]:
    """Return slice `number` of an array that `write_slices` wrote."""
    with open(path, "rb") as file:
        (count,) = np.fromfile(file, "<u8", 1)
        file.seek(8 * (1 + number))
        first, last = map(int, np.fromfile(file, "<u8", 2))
        file.seek(8 * (1 + int(count)) + first * kind.itemsize)
        return np.fromfile(file, kind, last - first)


def _disk(error: OSError) -> str:
    where = PARTIAL.sub(r"\1", str(error.filename or "a file"))
    if error.errno == errno.ENOSPC:
        return f"{where} cannot be written (no space left); make room and start the same command again."
    return f"{where}: {error.strerror or error}; correct it and start the same command again."


def remove_partial(folder: Path) -> None:
    """Remove partial files that a killed build left behind."""
    for found in folder.rglob("*.partial"):
        os.unlink(found)
