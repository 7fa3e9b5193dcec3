"""Hold rows in memory that processes share.

The memory has no name: it goes with the last process that holds it, also where one is killed, and the size of /dev/shm
does not bound it.
"""

import mmap
import os
import tempfile
from typing import Any, cast

import numpy as np

from data.packing import Rows, RowShape, empty_rows, row_arrays

ALIGNED = 64  # bytes; begin of each array


def make_rows(num_rows: int, shape: RowShape) -> tuple[int, Rows]:
    """Return rows without any example in new shared memory, and its file descriptor, which the caller closes."""
    size = _places(num_rows, shape)[1]
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("pali_rows")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor, empty_rows(num_rows, shape, map_rows(descriptor, num_rows, shape))


def map_rows(descriptor: int, num_rows: int, shape: RowShape) -> Rows:
    """Return the rows in the memory of a descriptor, which may be closed then; the arrays keep the memory."""
    places, size = _places(num_rows, shape)
    memory, arrays = mmap.mmap(descriptor, size), row_arrays(num_rows, shape)
    views: dict[str, Any] = {
        name: np.ndarray(dimensions, kind, memory, places[name]) for name, (dimensions, kind) in arrays.items()
    }
    return cast(Rows, views)


def _places(num_rows: int, shape: RowShape) -> tuple[dict[str, int], int]:
    """Return where each array begins, and the bytes of all of them (at least one, as no memory of 0 can be mapped)."""
    places, end = {}, 0
    for name, (dimensions, kind) in row_arrays(num_rows, shape).items():
        places[name] = end
        end += -(-int(np.prod(dimensions)) * np.dtype(kind).itemsize // ALIGNED) * ALIGNED
    return places, max(end, ALIGNED)
