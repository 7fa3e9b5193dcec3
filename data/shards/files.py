"""Read tars at random access: local files by handles that stay open, URLs by requests for ranges of bytes."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from data.shards import remote
from data.shards.remote import Cache, RemoteHandle, is_url
from data.shards.scan import status_stamp

MOST_HANDLES = 256  # open at once, per process; a usual limit is 1024

Stamp = tuple[int, int]


def stamp(path: str) -> Stamp:
    """Return size and modification time of a tar, or the version of an object; raise OSError."""
    return remote.stamp(path) if is_url(path) else status_stamp(os.stat(path))


@contextmanager
def local(path: str) -> Iterator[str]:
    """Give the path of a tar as a local file: itself, or a copy for as long as it is needed; raise OSError."""
    if is_url(path):
        with remote.copied(path) as copy:
            yield copy
    else:
        yield path


class Handle:
    """Hold an open file, which is closed when nothing uses it any more."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed in __del__)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def stamp(self) -> Stamp:
        """Return size and modification time now."""
        return status_stamp(os.fstat(self._file.fileno()))

    def read(self, offset: int, size: int) -> bytes:
        """Return these bytes, fewer at the end of the file; threads may read at the same time."""
        return os.pread(self._file.fileno(), size, offset)


class Handles:
    """Keep the files that were read last open; safe to use from threads."""

    def __init__(self, cache: Cache | None = None, most: int = MOST_HANDLES) -> None:
        self._cache, self._most, self._lock = cache, most, threading.Lock()
        self._open: OrderedDict[str, Handle | RemoteHandle] = OrderedDict()

    def get(self, path: str) -> Handle | RemoteHandle:
        """Return the open file of a path; raise OSError."""
        with self._lock:
            if path in self._open:
                self._open.move_to_end(path)
                return self._open[path]
        made = RemoteHandle(path, self._cache) if is_url(path) else Handle(path)
        with self._lock:
            found = self._open.setdefault(path, made)
            while len(self._open) > self._most:
                self._open.popitem(last=False)
        return found

    def forget(self, path: str) -> None:
        """Open the path again when it is next read: it failed, or was replaced."""
        with self._lock:
            self._open.pop(path, None)
