"""Make the records of the rows that are kept: OCR, questions, translations, negatives; and count. Stage 4."""

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data.corpus.card.counts import Counts
from data.corpus.row import Row, no_image
from data.corpus.stages.compare import LOW, judged_rows
from data.corpus.stages.plan import WORK, Plan
from data.corpus.steps import images, labels, questions, similarity
from data.corpus.steps.ocr import BoundedEngine, read_texts
from data.corpus.steps.translations import Translations, make_table
from data.skip import Skip, one_record

TABLE = "translations.sqlite"


def annotate_part(
    plan: Plan, number: int, path: Path, least: Mapping[str, int], every: Mapping[str, list[str]]
) -> None:
    """Write the records of a part as JSON Lines, behind a line of counts."""
    counts, lines = Counts(), []
    with open(plan.path("rows", number), encoding="utf-8") as rows:
        counts.defects.update(json.loads(next(rows))["defects"])
    own = plan.input(number)
    with contextlib.ExitStack() as opened:
        steps = _steps(plan, number, opened)
        for place, line, row in _with_rows(plan, number, steps.needs_image):
            if "drop" not in line and not _is_similar(line, least):
                line["drop"] = LOW
            if "drop" in line:
                counts.drop(line["drop"])
                continue
            record = {"id": line["id"], **line["fields"]}
            counts.notes.update(steps.annotate(record, row))
            source = plan.source(number)
            counts.notes["absent label drawn"] += labels.add_negatives(
                record, f"{source}/{line['id']}", every.get(source, []), own.negatives
            )
            counts.keep(line, record)
            lines.append(
                {"place": place, "key": f"{plan.parts[number].input}_{number:06d}_{place:06d}", "record": record}
            )
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        for each in ({"counts": counts.plain()}, *lines):
            file.write(json.dumps(each, ensure_ascii=False) + "\n")


def _is_similar(line: Mapping[str, Any], least: Mapping[str, int]) -> bool:
    return "score" not in line or similarity.is_kept(line["score"], line["fields"].get("language", "en"), least)


def source_labels(plan: Plan) -> dict[str, list[str]]:
    """Return the labels of each source that negatives are drawn from, sorted."""
    found: dict[str, set[str]] = {}
    for number in range(plan.evaluation_end, len(plan.parts)):
        if plan.input(number).negatives:
            for _, line in judged_rows(plan, number):
                if "drop" not in line:
                    found.setdefault(plan.source(number), set()).update(labels.labels(line["fields"]))
    return {source: sorted(own) for source, own in found.items()}


def prepare_tables(plan: Plan) -> None:
    """Write the tables of translations as one file, on one rank."""
    path = plan.folder / WORK / TABLE
    if plan.config.translations and not path.exists():
        scratch = path.with_suffix(".new")
        scratch.unlink(missing_ok=True)
        make_table(plan.config.translations, scratch)
        scratch.rename(path)


class _Steps:
    """Annotate records in the order OCR, questions, translations."""

    def __init__(self, plan: Plan, is_curated: bool, engine: BoundedEngine | None) -> None:
        config = plan.config
        self.plan, self.engine, self.is_curated = plan, engine, is_curated
        self.needs_image = engine is not None
        self.make: Callable[[str], Any] | None = questions.generator(config.questions) if config.questions else None
        self.translations = Translations(plan.folder / WORK / TABLE) if config.translations else None

    def annotate(self, record: dict[str, Any], row: Row | None) -> Counter[str]:
        """Add fields to a record, and return what was added and what went wrong."""
        notes: Counter[str] = Counter()
        try:
            with one_record("annotations"):
                if self.engine is not None and row is not None and "ocr" not in record:
                    self._read(record, row, notes)
                if self.make is not None:
                    notes["question made"] += questions.add(record, self.make)
                if self.translations is not None:
                    notes["translation added"] += self.translations.add(record)
        except Skip as skip:
            notes[skip.cause] += 1
        return +notes

    def _read(self, record: dict[str, Any], row: Row, notes: Counter[str]) -> None:
        content = None if row.image is no_image else row.image()
        if content is None or self.engine is None:
            return
        config = self.plan.config
        try:
            # OCR reads the whole image: small letters vanish in the copy that other steps see
            found = read_texts(images.whole(content), self.engine, config.ocr, config.language.engines)
        except Skip as skip:
            notes[skip.cause] += 1
            return
        if found:
            record["ocr"] = found
        notes["image read by OCR"] += 1


def _steps(plan: Plan, number: int, opened: contextlib.ExitStack) -> _Steps:
    needed = plan.config.ocr.engine != "none"
    engine = opened.enter_context(BoundedEngine(plan.config.ocr)) if needed else None
    return _Steps(plan, plan.input(number).is_curated, engine)


def _with_rows(plan: Plan, number: int, needed: bool) -> Iterator[tuple[int, dict[str, Any], Row | None]]:
    part = plan.parts[number]
    rows = plan.readers[part.input].rows(part, Counter()) if needed else None
    for place, line in judged_rows(plan, number):
        yield place, line, None if rows is None else next(rows)
