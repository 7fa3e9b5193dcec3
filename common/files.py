"""Files written in one piece: beside their place, then renamed, so that nobody reads half of one."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn


@contextmanager
def beside(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yield a path beside `path`, and rename it to `path` unless an error is raised.

    Its suffix is another one, so that nobody takes it for a shard or for weights.

    `durable`: wait until it is on the disk, for what a later process needs to go on.
    """
    scratch = _beside(path)
    try:
        yield scratch
        if durable:
            _sync(scratch)
        os.replace(scratch, path)
        if durable:
            _sync(path.parent)
    except OSError as error:
        raise_with_name(error, path)
    finally:
        with suppress(OSError):
            scratch.unlink()


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Write a text in UTF-8, in one piece; a lone surrogate is written as its escape."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"), durable)


def write_bytes(path: Path, content: bytes, durable: bool = False) -> None:
    """Write a file in one piece."""
    with beside(path, durable) as scratch:
        scratch.write_bytes(content)


def raise_with_name(error: OSError, path: Path) -> NoReturn:
    """Raise the error with the name of a file, which one of writing or syncing lacks: a user must find the disk."""
    if error.filename is not None or error.errno is None:
        raise error
    raise OSError(error.errno, error.strerror, str(path)) from error


def _beside(path: Path) -> Path:
    # Names have 255 bytes at most, and a character up to four.
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.partial")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
