"""Define a row of a download, and the parts that ranks read."""

import csv
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data.skip import Skip
from data.storage import retry

NO_IMAGE, NO_FILE = "no image", "missing image file"
csv.field_size_limit(sys.maxsize)  # Python's own limit, 131,072 characters, ends the reading of a whole file


def no_image() -> bytes | None:
    """Return None: the row has no image."""
    return None


@dataclass
class Row:
    """Hold one row of a download: its fields as in docs/data.md, and how its image is read.

    `cause`: the reason why it cannot be used, found while it was read. `score`: similarity of image and text, if the
    download has one.
    """

    id: str
    fields: dict[str, Any] = field(default_factory=dict)
    image: Callable[[], bytes | None] = no_image
    cause: str | None = None
    score: float | None = None


class Part(NamedTuple):
    """Name the rows that one rank reads at a time: rows `start` to `stop` of a file, all if `stop` is -1."""

    input: str
    file: str
    start: int = 0
    stop: int = -1


class Reader(Protocol):
    """Read one input. `rows` is a pure function of the part; it counts defects of the file as a whole in `defects`."""

    def files(self) -> list[Path]:
        """Return the files whose change makes another corpus."""
        ...

    def parts(self) -> list[Part]:
        """Return the parts, in the order of the corpus."""
        ...

    def rows(self, part: Part, defects: Counter[str]) -> Iterator[Row]:
        """Yield every row of a part, also those that cannot be used."""
        ...


def image_file(path: Path) -> Callable[[], bytes]:
    """Return a function that reads an image file; it raises Skip where the file is missing."""

    def read() -> bytes:
        try:
            return retry(path.read_bytes, str(path))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise Skip(NO_FILE, defect=True, detail=str(path)) from error

    return read
