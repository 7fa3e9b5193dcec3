"""Find the files of an input."""

import bz2
import glob
import gzip
from pathlib import Path
from typing import IO, cast

from common.errors import ConfigurationError


def matching(name: str, path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the file, the files of a folder with one of the suffixes, or those of a pattern, sorted.

    Raises ConfigurationError where there is none.
    """
    here = Path(path)
    if here.is_file():
        return [here]
    if here.is_dir():
        found = [each for each in here.rglob("*") if each.is_file() and each.name.endswith(suffixes)]
    else:
        found = [Path(each) for each in glob.glob(path, recursive=True) if Path(each).is_file()]
    if not found:
        wanted = f"no {' or '.join(suffixes)} file in it" if here.is_dir() else "no such file"
        raise ConfigurationError(f"inputs.{name}.path={path} has {wanted}; name the folder of the downloads.")
    return sorted(found)


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file, decompressed if its name ends with .gz or .bz2."""
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix == ".bz2":
        return cast(IO[bytes], bz2.open(path, "rb"))
    return open(path, "rb")
