"""Read the images and texts of an evaluation set: image files, tars, or JSON Lines, whatever lies in a folder."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from common.errors import ConfigurationError
from data.corpus.config import InputConfig
from data.corpus.inputs.folders import matching
from data.corpus.inputs.tables import Tables
from data.corpus.inputs.tars import Tars
from data.corpus.row import Part, Reader, Row, image_file

IMAGES = (".jpg", ".jpeg", ".JPEG", ".JPG", ".png", ".webp")
TEXTS = (".jsonl", ".jsonl.gz")
IMAGES_PER_PART = 10_000


class ImageFiles:
    """Read the image files of a folder."""

    def __init__(self, name: str, path: str) -> None:
        self.name, self.root = name, Path(path)
        self.paths = matching(name, path, IMAGES)

    def files(self) -> list[Path]:
        """See Reader.files."""
        return self.paths

    def parts(self) -> list[Part]:
        """See Reader.parts."""
        number, step = len(self.paths), IMAGES_PER_PART
        return [Part(self.name, str(self.root), start, start + step) for start in range(0, number, step)]

    def rows(self, part: Part, defects: Counter[str]) -> Iterator[Row]:
        """See Reader.rows."""
        for path in self.paths[part.start : part.stop]:
            yield Row(str(path.relative_to(self.root) if path != self.root else path.name), {}, image_file(path))


def open_evaluation(name: str, path: str) -> Reader:
    """Return the reader of an evaluation set. Raises ConfigurationError for a path without anything to read."""
    here = Path(path)
    names = [here.name] if here.is_file() else [file.name for file in here.rglob("*")] if here.is_dir() else []
    if "*" in path or any(one.endswith(".tar") for one in names):
        return Tars(name, InputConfig(path=path), 64)
    if any(one.endswith(IMAGES) for one in names):
        return ImageFiles(name, path)
    if any(one.endswith(TEXTS) for one in names):
        return Tables(name, InputConfig(path=path, format="text"), IMAGES_PER_PART)
    raise ConfigurationError(
        f"{name}={path} holds no image, tar or JSON Lines file; name the images or texts of an evaluation set."
    )
