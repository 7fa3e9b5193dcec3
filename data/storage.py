"""Retry reads while storage fails, and separate a failing disk from bad data.

A read that fails with an error of `errors.STORAGE_ERRNOS` is retried, at growing intervals, for `patience_s`; then
StorageFailed is raised, and the job is queued again. If the file was there before, a folder that is gone or empty is a
lost mount and is retried too. A file that is missing from a folder with other files was removed: this error, and every
other, is raised at once for the caller to handle.
"""

import errno
import logging
import os
import random
import stat
import time
from collections.abc import Callable
from typing import TypeVar

from common.errors import STORAGE_ERRNOS, ConfigurationError, StorageFailed
from common.progress import beat

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0  # a file server that fails over is back within a minute
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 5.0

Result = TypeVar("Result")
_random = random.Random()  # of its own, so that nothing else depends on how often a disk failed
# Folders whose storage failed for `patience_s`: other threads with records there raise without waiting again.
_lost: set[str] = set()


def retry(read: Callable[[], Result], path: str, patience_s: float = PATIENCE_S, was_there: bool = False) -> Result:
    """Call `read`, again and again while the storage of `path` fails, and return its result.

    `was_there`: a missing folder is a lost mount, not a wrong path. Raises StorageFailed after `patience_s`, and every
    other OSError at once.
    """
    deadline, wait_s, folder = time.monotonic() + patience_s, FIRST_WAIT_S, os.path.dirname(path)
    while True:
        try:
            result = read()
            _lost.discard(folder)
            return result
        except OSError as error:
            if error.errno not in STORAGE_ERRNOS and not (was_there and _is_unmounted(error, path)):
                raise
            left_s = deadline - time.monotonic()
            if left_s <= 0 or folder in _lost:
                _lost.add(folder)
                raise storage_failed(error, path, patience_s) from error
            if wait_s == FIRST_WAIT_S:
                logger.warning("%s: %s; trying again for %.0f s", path, error.strerror, left_s)
        beat(f"waiting for {path}")
        time.sleep(
            min(left_s, wait_s * _random.uniform(0.5, 1.0))
        )  # random, so that a thousand ranks do not retry at the same moment
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def storage_failed(error: OSError, path: str, after_s: float = 0.0) -> StorageFailed:
    """Return the exception for a file that cannot be read now."""
    name = errno.errorcode.get(error.errno or 0, "no errno")
    tried = f" for {after_s:g} s" if after_s else ""
    return StorageFailed(
        f"{path} could not be read{tried} ({error.strerror or error}, {name}); start the same command again when its "
        "storage is back."
    )


def not_permitted(path: str) -> ConfigurationError:
    """Return the exception for a file or folder that this user has no permission to read."""
    remedy = "use other credentials" if "://" in path else "change its mode"
    return ConfigurationError(f"{path} may not be read (permission denied): {remedy}, or leave it out.")


def read_file(path: str, patience_s: float = PATIENCE_S) -> bytes:
    """Return a file's content; raise StorageFailed, or OSError as `open` does."""

    def read() -> bytes:
        with open(path, "rb") as file:
            return file.read()

    return retry(read, path, patience_s)


def is_folder(path: str, patience_s: float = PATIENCE_S) -> bool:
    """Return whether a path is a folder; False if nothing is there."""
    try:
        return stat.S_ISDIR(retry(lambda: os.stat(path), path, patience_s).st_mode)
    except PermissionError as error:
        raise not_permitted(path) from error
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return False


def _is_unmounted(error: OSError, path: str) -> bool:
    """Return whether a file is missing and its folder is missing or empty, as after a lost mount."""
    if error.errno != errno.ENOENT or "://" in path:
        return False
    try:
        with os.scandir(os.path.dirname(path) or os.curdir) as entries:
            return next(entries, None) is None
    except OSError:
        return True
