"""Read tables: parquet, CSV, TSV and JSON Lines; CC3M's and CC12M's TSV; JSON Lines of documents, as mC4's."""

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common.errors import ConfigurationError
from data.corpus.config import InputConfig
from data.corpus.inputs.folders import matching, open_bytes
from data.corpus.inputs.tars import KEPT
from data.corpus.row import Part, Row, image_file, no_image

SUFFIXES = tuple(f".{kind}{packed}" for kind in ("csv", "tsv", "jsonl", "json") for packed in ("", ".gz", ".bz2"))
# The first of these columns that a table has, where `columns` names none; img2dataset's, LAION's and Hugging Face's.
GUESSES = {
    "id": ("id", "key", "image_id"),
    "image": ("image", "jpg", "image_path", "file_name", "path"),
    "alt_text": ("alt_text", "caption", "TEXT", "text"),
    "url": ("url", "URL"),
    "similarity": ("similarity",),
}
TEXT_GUESSES = {"id": ("id",), "text": ("text", "content", "caption", "question"), "url": ("url",)}
HEADERS = {"cc3m": ("alt_text", "url"), "cc12m": ("url", "alt_text")}  # their TSV files have no header
MC4_NAME = re.compile(r"c4-([a-z]{2,3}(?:-[A-Za-z]+)?)\.")
UNREADABLE_ROWS, UNREADABLE_FILE = "unreadable rows of a parquet file", "unreadable parquet file"


class Tables:
    """Read tables; a part is a CSV or JSON Lines file, or some row groups of a parquet file."""

    def __init__(self, name: str, config: InputConfig, part_rows: int) -> None:
        self.name, self.config, self.part_rows = name, config, part_rows
        self.documents = config.format in ("text", "mc4")
        suffixes = SUFFIXES if self.documents else (*SUFFIXES, ".parquet")
        self.paths = [path for own in self._paths() for path in matching(name, str(own), suffixes)]
        root = Path(config.path)
        self.images = (root if root.is_dir() else root.parent) / config.images

    def _paths(self) -> list[str]:
        root = Path(self.config.path)
        return [str(root / file) for file in self.config.files] or [str(root)]

    def files(self) -> list[Path]:
        """See Reader.files. Images that lie beside a table are not in the list: there are millions of them."""
        return self.paths

    def parts(self) -> list[Part]:
        """See Reader.parts."""
        return [part for path in self.paths for part in self._parts(path)]

    def _parts(self, path: Path) -> Iterator[Part]:
        if path.suffix != ".parquet":
            yield Part(self.name, str(path))
            return
        groups = _row_groups(path)
        start, rows = 0, 0
        for number, size in enumerate(groups):
            rows += size
            if rows >= self.part_rows or number == len(groups) - 1:
                yield Part(self.name, str(path), start, number + 1)
                start, rows = number + 1, 0
        if not groups:
            yield Part(self.name, str(path), 0, 0)  # its defect is counted when it is read

    def rows(self, part: Part, defects: Counter[str]) -> Iterator[Row]:
        """See Reader.rows."""
        path = Path(part.file)
        language = self.config.language
        if not language and self.documents and (named := MC4_NAME.search(path.name)):
            language = named[1]
        for number, found in enumerate(self._raw(path, part, defects)):
            if isinstance(found, str):
                yield Row(f"{path.name}:{number}", cause=found)
            else:
                yield self._row(path, number, found, language)

    def _raw(self, path: Path, part: Part, defects: Counter[str]) -> Iterator[dict[str, Any] | str]:
        """Yield each row as a mapping, or the cause why it is none."""
        if path.suffix == ".parquet":
            yield from _parquet(path, part, defects)
            return
        try:
            with open_bytes(path) as file:
                kind = path.name.removesuffix(".gz").removesuffix(".bz2").rpartition(".")[2]
                if kind in ("csv", "tsv"):
                    yield from _csv(file, kind, HEADERS.get(self.config.format))
                else:
                    yield from _json_lines(file)
        except EOFError:
            defects["truncated compressed file"] += 1

    def _row(self, path: Path, number: int, found: dict[str, Any], language: str) -> Row:
        guesses = TEXT_GUESSES if self.documents else GUESSES
        names = {field: next((one for one in guess if one in found), "") for field, guess in guesses.items()}
        names |= self.config.columns
        get = {field: found.get(column) for field, column in names.items() if column}
        fields = {name: get.get(name, found.get(name)) for name in KEPT if name not in ("text", "similarity")}
        if self.documents or "text" in self.config.columns:
            fields["text"] = get.get("text")
        if language and (fields.get("alt_text") is not None or fields.get("text") is not None):
            fields["language"] = language
        fields = {name: value for name, value in fields.items() if value is not None}
        identifier = get.get("id")
        score = get.get("similarity")
        row = Row(f"{path.stem}:{number}" if identifier is None else str(identifier), fields)
        row.score = float(score) if isinstance(score, int | float) else None
        if not self.documents:
            self._add_image(row, get.get("image"), number, str(fields.get("url", "")))
        return row

    def _add_image(self, row: Row, value: Any, number: int, url: str) -> None:
        """Set the image: bytes, Hugging Face's {bytes, path}, or a file below `images`."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            content = value
            row.image = lambda: content
        elif self.config.image_name or isinstance(value, str):
            hashed = hashlib.sha256(url.encode(errors="surrogateescape")).hexdigest()
            try:
                name = self.config.image_name.format(image=value, image_id=row.id, row=number, url_sha256=hashed)
            except (KeyError, IndexError, ValueError) as error:
                raise ConfigurationError(
                    f"inputs.{self.name}.image_name={self.config.image_name!r} cannot be filled ({error!r}); use "
                    "{image}, {image_id}, {row} or {url_sha256}."
                ) from error
            row.image = image_file(self.images / (name or str(value)))
        else:
            row.image = no_image


def _row_groups(path: Path) -> list[int]:
    """Return the rows of each row group, none for a file that cannot be read."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            return [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
    except (ArrowException, ValueError):
        return []


def _parquet(path: Path, part: Part, defects: Counter[str]) -> Iterator[dict[str, Any] | str]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except (ArrowException, ValueError):
        defects[UNREADABLE_FILE] += 1
        return
    with file:
        for group in range(part.start, part.stop):
            given, expected = 0, file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(1000, row_groups=[group]):
                    for row in batch.to_pylist():
                        given += 1
                        yield row
            except (ArrowException, ValueError, OSError):
                defects["damaged row group of a parquet file"] += 1
                yield from [UNREADABLE_ROWS] * (expected - given)


def _csv(file: Any, kind: str, header: tuple[str, ...] | None) -> Iterator[dict[str, Any] | str]:
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    lines = _without_nul(text)
    rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if kind == "tsv" else csv.reader(lines)
    try:
        names = header or tuple(next(rows, ()))
        for row in rows:
            if len(row) == len(names):
                yield dict(zip(names, row, strict=True))
            elif row:
                yield "row with another number of columns"
    except csv.Error:
        yield "row that is no CSV"


def _without_nul(lines: Iterable[str]) -> Iterator[str]:
    return (line.replace("\0", "") for line in lines)


def _json_lines(file: Any) -> Iterator[dict[str, Any] | str]:
    for line in file:
        if not line.strip():
            continue
        try:
            found = json.loads(line.decode("utf-8", errors="surrogateescape"))
        except (ValueError, RecursionError):
            yield "broken JSON"
            continue
        yield found if isinstance(found, dict) else "JSON that is no object"
