"""All text that a model trained on a corpus reads or writes, for training its tokenizer."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data import objectives
from data.ledger import Ledger
from data.objectives import detection
from data.objectives.base import MALFORMED, SENTINEL, Skip
from data.shards import ShardSource
from errors import ConfigurationError


def corpus_texts(root: str | Path, split: str = "train") -> Iterator[str]:
    """Every text of every record of `split` in every source folder of `root`, and the prompts that it serves."""
    folders = sorted(folder for folder in Path(root).glob("*") if any(folder.glob("*.tar")))
    if not folders:
        raise ConfigurationError(
            f"no folder of shards in {root}: point root to a corpus (<root>/<source>/<split>-*.tar), or make one "
            "(python -m data.miniature)."
        )
    for folder in folders:
        ledger = Ledger(budget=1.0, minimum=0)  # tells of what is broken, and never stops
        source = ShardSource(folder.name, str(folder), split, ledger)
        for number in range(len(source)):
            try:
                fields = source[number].fields
                texts = [*filter(None, map(str, record_texts(fields))), *prompts(fields, np.random.default_rng(number))]
            except Skip:
                continue
            except MALFORMED:
                ledger.count_defect(source.name, source.shard(number), "malformed fields")
                continue
            yield from texts


def record_texts(fields: Mapping[str, Any]) -> Iterator[str]:
    """Every text of one record: as it stands there, and its boxes as detection writes them."""
    yield str(fields.get("alt_text") or "")
    yield from (fields.get("captions") or {}).values()
    yield from (item["text"] for item in fields.get("ocr") or [])
    for triplet in fields.get("questions") or []:
        yield triplet["question"]
        yield triplet["answer"]
    for item in fields.get("objects") or []:
        yield detection.box_text(item["box"], item["label"])
    yield ", ".join(fields.get("absent_labels") or [])
    yield str(fields.get("text") or "")


def prompts(fields: Mapping[str, Any], rng: np.random.Generator) -> Iterator[str]:
    """What each objective asks of one record: every example carries a prompt, so its words deserve whole pieces."""
    for name in objectives.NAMES:
        objective = objectives.load(name)
        if not objective.PROMPTS:  # span corruption works on the tokens that are yet to be found
            continue
        try:
            example = objective.make(fields, rng, objectives.options(name, {}), _Nothing())
        except Skip:
            continue
        yield example.input_text.replace(SENTINEL, "").rstrip()


class _Nothing:
    """The vocabulary of objectives that use none."""

    def encode(self, text: str) -> list[int]:
        return []

    def decode(self, ids: Sequence[int]) -> str:
        return ""

    def sentinel(self, number: int) -> int:
        return 0
