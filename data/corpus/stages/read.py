"""Read parts: judge each row by itself, and hash it. Stage 1."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import fields, languages
from data.corpus.config import InputConfig
from data.corpus.row import NO_IMAGE, Row, no_image
from data.corpus.stages.plan import Plan
from data.corpus.stages.work import write_slices
from data.corpus.steps import features, hashes, images, rules, similarity, text
from data.corpus.steps.hashes import CURATED, ENTRY, EXACT, ID, Entries, digest, entries
from data.corpus.steps.language import identify
from data.skip import Skip, one_record

ROW_BITS = 32  # a row's number is its part's number, shifted, plus its place in the part
NO_SCORE = "no similarity"


def read_part(plan: Plan, number: int, path: Path) -> None:
    """Write the rows of a part as JSON Lines, behind a line of defects; and the entries of its hashes."""
    lines, made, defects = [], [], Counter[str]()
    scores = _Scores(plan)
    part = plan.parts[number]
    for place, row in enumerate(plan.readers[part.input].rows(part, defects)):
        line, own, pixels = judge(plan, number, (number << ROW_BITS) + place, row)
        lines.append(line)
        made += own
        if number >= plan.evaluation_end and "drop" not in line and not plan.input(number).is_curated:
            scores.add(line, row, pixels)
    scores.finish()
    write_entries(plan, number, np.concatenate(made) if made else np.zeros(0, ENTRY))
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        for line in ({"defects": dict(defects)}, *lines):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_entries(plan: Plan, number: int, found: Entries) -> None:
    """Write a part's entries, sorted by key and divided into partitions."""
    ordered = found[np.argsort(found["key"], kind="stable")]
    partitions = plan.config.duplicates.partitions
    edges = [(each << 64) // partitions for each in range(1, partitions)]
    bounds = np.searchsorted(ordered["key"], np.array(edges, np.uint64))
    write_slices(plan.path("entries", number), ordered, np.r_[0, bounds, len(ordered)])


def judge(plan: Plan, number: int, row_number: int, row: Row) -> tuple[dict[str, Any], list[Entries], Any]:
    """Return a row as a line, its entries, and its pixels; the line has the cause if the row cannot be used."""
    line: dict[str, Any] = {"id": row.id}
    try:
        with one_record("the row"):
            if row.cause is not None:
                raise Skip(row.cause)
            if number < plan.evaluation_end:
                return line, _evaluation_entries(plan, row_number, row), None
            return _judged(plan, number, row_number, row, line)
    except Skip as skip:
        line = {"id": row.id, "drop": skip.cause}
        return line, [], None


def _judged(
    plan: Plan, number: int, row_number: int, row: Row, line: dict[str, Any]
) -> tuple[dict[str, Any], list[Entries], Any]:
    config, own = plan.config, plan.input(number)
    record = dict(row.fields)
    is_document = row.image is no_image and "text" in record
    seen = None
    content = None
    if not is_document and not (own.is_curated and row.image is no_image):
        content = row.image()
        if content is None:
            raise Skip(NO_IMAGE)
        seen = images.look(content, config.image, own.is_curated)
        line["size"] = [seen.width, seen.height]
    _judge_texts(plan, own, record, is_document, line)
    if not own.is_curated:
        rules.check(config.rules, record, None if seen is None else seen.pixels)
    flags = CURATED if own.is_curated else 0
    source = plan.source(number)
    made = [entries(ID, row_number, [digest("id", plan.parts[number].input, row.id)], None, flags)]
    if content is not None and seen is not None:
        made += _image_entries(plan, source, row_number, content, seen.pixels, record, flags)
    if is_document and config.duplicates.texts:
        made += hashes.text_entries(source, row_number, " ".join(fields.document(record)), flags)
    line["fields"] = record
    return line, made, None if seen is None else seen.pixels


def _judge_texts(plan: Plan, own: InputConfig, record: dict[str, Any], is_document: bool, line: dict[str, Any]) -> None:
    """Check the texts of a row, and identify their language; they are cleaned in `record`."""
    if is_document:
        found, cut = text.cut_document(fields.document(record), plan.config.text)
        record["text"] = found[0] if len(found) == 1 else found
        line |= {"note": "document cut"} if cut else {}
    elif own.is_curated or "captions" in record:
        return
    else:
        found = text.check_alt_text(text.texts(record.get("alt_text")), plan.config.text)
        record["alt_text"] = found[0] if len(found) == 1 else found
    language = plan.config.language
    code = own.language or record.get("language") or ""
    if code:
        record["language"] = languages.canonical(str(code)) or str(code)
    elif language.engines:
        record["language"], line["confidence"] = identify(" ".join(found), language.engines)
        if line["confidence"] < language.min_confidence:
            raise Skip("uncertain language")
    if language.keep and not languages.accepts(language.keep, fields.language(record)):
        raise Skip("other language")


def _image_entries(
    plan: Plan, source: str, row: int, content: bytes, pixels: NDArray[np.uint8], record: dict[str, Any], flags: int
) -> list[Entries]:
    config = plan.config.duplicates
    texts = json.dumps(record.get("alt_text", ""), ensure_ascii=False)
    payload = np.array([digest(texts), 0, 0, 0], np.uint64)
    made = [entries(EXACT, row, [digest("exact", source, content)], payload, flags)]
    return made + (features.compared(source, row, pixels, config, flags) if config.images else [])


def _evaluation_entries(plan: Plan, row_number: int, row: Row) -> list[Entries]:
    """Return the entries of a row of an evaluation set, in the buckets of every source."""
    if row.image is no_image:
        words = fields.document(row.fields)
        return [one for source in plan.sources for one in hashes.text_entries(source, row_number, " ".join(words), 0)]
    content = row.image()
    if content is None:
        raise Skip(NO_IMAGE)
    pixels = images.look(content, plan.config.image, curated=True).pixels
    return [one for source in plan.sources for one in _image_entries(plan, source, row_number, content, pixels, {}, 0)]


class _Scores:
    """Score image-text pairs in batches; a score is put into the row's line."""

    def __init__(self, plan: Plan) -> None:
        self.config = plan.config.similarity
        self._waiting: list[tuple[dict[str, Any], NDArray[np.uint8], str]] = []

    def add(self, line: dict[str, Any], row: Row, pixels: NDArray[np.uint8] | None) -> None:
        """Add a row that is kept so far. A document has no score."""
        if not self.config.scorer or pixels is None:
            return
        if self.config.scorer == "column":
            if row.score is None:
                line["drop"] = NO_SCORE
            else:
                line["score"] = similarity.step(row.score)
            return
        self._waiting.append((line, pixels, next(iter(_captions(line["fields"])), "")))
        if len(self._waiting) >= self.config.batch:
            self.finish()

    def finish(self) -> None:
        """Score the rows that wait."""
        score = similarity.scorer(self.config.scorer, self.config.weights) if self._waiting else None
        if score is not None:
            found = score([pixels for _, pixels, _ in self._waiting], [words for _, _, words in self._waiting])
            for (line, _, _), one in zip(self._waiting, found, strict=True):
                line["score"] = similarity.step(float(one))
        self._waiting.clear()


def _captions(record: dict[str, Any]) -> Iterator[str]:
    value = record.get("alt_text")
    yield from [value] if isinstance(value, str) else value or ()
