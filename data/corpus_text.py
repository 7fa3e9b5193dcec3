"""All text that a model trained on a corpus reads or writes, for training its tokenizer."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data import objectives
from data.ledger import Ledger
from data.objectives import detection
from data.objectives.base import Skip
from data.shards import ShardSource
from errors import ConfigurationError


def corpus_texts(root: str | Path, split: str = "train") -> Iterator[str]:
    """The objectives' prompts, then every text of every record of `split` in every source folder of `root`."""
    for name in objectives.NAMES:
        for prompt in objectives.load(name).PROMPTS:
            yield prompt.replace("<extra_id_0>", "").format_map(_Empty())
    folders = sorted(folder for folder in Path(root).glob("*") if any(folder.glob("*.tar")))
    if not folders:
        raise ConfigurationError(
            f"no folder of shards in {root}: point root to a corpus (<root>/<source>/<split>-*.tar)."
        )
    for folder in folders:
        source = ShardSource(folder.name, str(folder), split, Ledger(budget=1.0, minimum=0))
        for number in range(len(source)):
            try:
                record = source[number]
            except Skip:
                continue
            yield from (text for text in record_texts(record.fields) if text)


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


class _Empty(dict[str, str]):
    """Every slot of a prompt, left empty."""

    def __missing__(self, key: str) -> str:
        return ""
