"""Read img2dataset's tars: one row a sample."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data import fields
from data.corpus.config import InputConfig
from data.corpus.inputs.folders import matching
from data.corpus.row import Part, Row, no_image
from data.shards.scan import scan
from data.skip import Skip
from data.storage import not_permitted, retry

KEPT = ("alt_text", "language", "captions", "ocr", "questions", "objects", "absent_labels", "text", "url", "similarity")
JSON, TEXT, IMAGE = range(3)  # columns of an index


class Tars:
    """Read tars, each of them as one part."""

    def __init__(self, name: str, config: InputConfig, max_mib: int) -> None:
        self.name, self.config, self.limit = name, config, max_mib << 20
        self.paths = matching(name, config.path, (".tar",))

    def files(self) -> list[Path]:
        """See Reader.files."""
        return self.paths

    def parts(self) -> list[Part]:
        """See Reader.parts."""
        return [Part(self.name, str(path)) for path in self.paths]

    def rows(self, part: Part, defects: Counter[str]) -> Iterator[Row]:
        """See Reader.rows. The whole samples of a truncated tar are rows, and the tar is one defect."""
        try:
            shard = retry(lambda: scan(part.file), part.file, was_there=True)
        except PermissionError as error:
            raise not_permitted(part.file) from error
        if shard.defect:
            defects[shard.defect] += 1
        with open(part.file, "rb") as file:

            def content(span: Any) -> bytes | None:
                offset, size = map(int, span)
                if size < 0:
                    return None

                def read() -> bytes:
                    file.seek(offset)
                    return file.read(size)

                return retry(read, part.file, was_there=True)

            for key, spans in zip(shard.keys, shard.spans, strict=True):
                yield self._row(key, spans, content)

    def _row(self, key: str, spans: Any, content: Callable[[Any], bytes | None]) -> Row:
        if max(int(size) for _, size in spans) > self.limit:
            return Row(key, cause=f"file of more than {self.limit >> 20} MiB")
        try:
            found = fields.parse(content(spans[JSON]), content(spans[TEXT]))
        except Skip as skip:
            return Row(key, cause=skip.cause)
        kept = {name: found[name] for name in KEPT if found.get(name) is not None}
        score = kept.pop("similarity", None)
        return Row(
            str(found.get("key", key)),
            kept,
            no_image if int(spans[IMAGE][1]) < 0 else lambda: content(spans[IMAGE]),
            score=float(score) if isinstance(score, int | float) else None,
        )
