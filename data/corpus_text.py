"""Read all text of a corpus and all prompts made of it, for training a tokenizer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from data import fields, objectives
from data.error_budget import Ledger
from data.objectives import detection
from data.objectives.base import SENTINEL
from data.shards.field_map import check_places, check_sources
from data.shards.paths import locations
from data.shards.source import ReadOptions, ShardSource
from data.skip import Skip, one_record


def corpus_texts(
    root: str | Path,
    split: str = "train",
    error_budget: float = 0.01,
    error_budget_minimum: int = 16,
    sources: Mapping[str, str] | None = None,
    field_maps: Mapping[str, Mapping[str, str]] | None = None,
    index_folder: str | None = None,
    records: int | None = None,
) -> Iterator[str]:
    """Yield every text of the records of `split` in every source of `root`, and the prompts made of them.

    `records`: at most so many of each source, evenly spread; None: all.

    `sources`: locations by name as `data.sources`, else every folder of `root` that holds tars. `field_maps` and
    `index_folder`: as `data.fields` and `data.index_folder`. Raises ErrorBudgetExceeded for a source with more broken
    records than the budget allows, as training does.
    """
    found = locations(str(root), sources or {})
    check_sources(field_maps or {}, found, "fields")
    for name, location in found.items():
        ledger = Ledger(error_budget, error_budget_minimum)
        options = ReadOptions(index_folder=index_folder, fields=(field_maps or {}).get(name, {}))
        source = ShardSource(name, location, split, ledger, options)
        check_places(source, f"fields.{name}")
        numbers = np.linspace(0, len(source) - 1, min(records or len(source), len(source)), dtype=np.int64)
        for number in numbers.tolist():
            texts, defect = _record_texts(source, number)
            if defect is None:
                ledger.count_used(source.name)
            else:
                place = f"record {source.key(source.numbered(number))!r:.100}: {defect.detail}"
                ledger.count_defect(source.name, source.shard(source.numbered(number)), defect.cause, place)
            yield from texts


def _record_texts(source: ShardSource, number: int) -> tuple[list[str], Skip | None]:
    """Return the texts of one record, and the first defect in it; the other fields of a broken record still count."""
    defect: Skip | None = None
    texts: list[str] = []
    try:
        with one_record("its texts"):
            record = source[number].fields
    except Skip as skip:
        return [], skip
    for read in [*READERS, lambda record: prompts(record, np.random.default_rng(number))]:
        try:
            with one_record("its texts"):
                texts += read(record)
        except Skip as skip:
            defect = defect or (skip if skip.defect else None)
    return [text for text in texts if text], defect


def _any_language(code: str) -> bool:
    return True


# Readers of the texts of each field, as in the record; boxes as detection writes them.
READERS: tuple[Callable[[fields.Fields], list[str]], ...] = (
    fields.alt_text,
    lambda record: [text for texts in fields.captions(record, _any_language).values() for text in texts],
    lambda record: [word.text for word in fields.ocr(record, _any_language)],
    lambda record: [
        text for each in fields.questions(record, _any_language) for text in (*each.questions, *each.answers)
    ],
    lambda record: [
        detection.box_text(each.box, each.label) if each.box else each.label for each in fields.objects(record, True)
    ],
    lambda record: [", ".join(fields.absent_labels(record))],
    fields.document,
)


def prompts(record: Mapping[str, Any], rng: np.random.Generator) -> list[str]:
    """Return the prompts of all objectives for one record: frequent words, which deserve pieces of their own."""
    found = []
    for name in objectives.NAMES:
        objective = objectives.load(name)
        if not objective.PROMPTS:  # span corruption needs tokens, which do not exist yet
            continue
        try:
            example = objective.make(record, rng, _default_options(name), _Nothing())
        except Skip:  # a defect is counted when the field itself is read
            continue
        found.append(example.input_text.removesuffix(SENTINEL).rstrip())
    return found


@cache
def _default_options(objective: str) -> Any:
    """Return the options without settings; to check them for each record would take nearly all of the time."""
    return objectives.options(objective, {})


class _Nothing:
    """Stub vocabulary for objectives that use none."""

    def encode(self, text: str) -> list[int]:
        return []

    def decode(self, ids: Sequence[int]) -> str:
        return ""

    def sentinel(self, number: int) -> int:
        return 0
