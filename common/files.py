"""Write files in one piece: to a partial file beside the final name, then renamed. No reader sees half of one."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from common.errors import ConfigurationError


@contextmanager
def beside(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yield a partial file beside `path`; rename it to `path` at the end, or remove it if an error is raised.

    Its suffix is `.partial`, so that it is never read as a shard or as weights. `durable`: wait until file and name are
    on the disk, for files that a later process needs to continue. Raises OSError with the name of `path`.
    """
    # Names have 255 bytes at most, and a character up to four.
    partial = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        if durable:
            _sync(partial)
        os.replace(partial, path)
        if durable:
            _sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise_with_name(error, path)
        raise


@contextmanager
def writes(setting: str, instead: str = "another") -> Iterator[None]:
    """Raise ConfigurationError where the body cannot write what a setting (`output=<path>`) names."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise ConfigurationError(f"{setting} cannot be written ({why}); choose {instead}.") from error


def check_new_folder(folder: Path) -> None:
    """Raise ConfigurationError for an `output` that is a file, or a folder that holds something."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigurationError(f"output={folder} exists and is not an empty folder; choose another, or remove it.")


def read_manifest(path: Path) -> Any:
    """Return the JSON in a file that a command of ours wrote. Raises ConfigurationError where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} is no JSON; choose another folder or remove it.") from error


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Write a text in UTF-8, in one piece; a lone surrogate is written as its escape."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"), durable)


def write_bytes(path: Path, content: bytes, durable: bool = False) -> None:
    """Write a file in one piece."""
    with beside(path, durable) as partial:
        partial.write_bytes(content)


def raise_with_name(error: OSError, path: Path) -> NoReturn:
    """Raise the error with the name of a file, which errors of writing and syncing lack."""
    if error.filename is not None or error.errno is None:
        raise error
    raise OSError(error.errno, error.strerror, str(path)) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
