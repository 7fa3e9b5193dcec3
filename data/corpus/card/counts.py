"""Count the rows of a corpus by cause, language and size. Counts add up: rows = kept + those dropped by each cause."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from data import languages
from data.objectives.split_captioning import word_starts

FIELDS = ("alt_text", "captions", "ocr", "questions", "text", "objects")


@dataclass
class Counts:
    """Hold the counts of some rows. `languages` counts texts by field and code, `histograms` kept rows by bin."""

    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    defects: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    languages: dict[str, Counter[str]] = field(default_factory=dict)
    histograms: dict[str, Counter[int]] = field(default_factory=dict)
    labels: Counter[str] = field(default_factory=Counter)

    def drop(self, cause: str) -> None:
        """Count a row that is not kept."""
        self.rows += 1
        self.dropped[cause] += 1

    def keep(self, line: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Count a row that is kept, with the texts of its record."""
        self.rows += 1
        self.kept += 1
        if "note" in line:
            self.notes[line["note"]] += 1
        if "size" in line:
            self._bin("side", max(line["size"]).bit_length() - 1)
            self._bin("megapixels", round(10 * line["size"][0] * line["size"][1] / 1e6))
        if "score" in line:
            self._bin("similarity", line["score"] // 100)
        if "confidence" in line:
            self._bin("confidence", int(line["confidence"] * 20))
        for name, code, text in texts(record):
            self.languages.setdefault(name, Counter())[code] += 1
            if name in ("alt_text", "captions"):
                self._bin("words", min(len(word_starts(text)), 100))
        self.labels.update({str(each.get("label")) for each in record.get("objects") or ()})

    def add(self, other: "Counts") -> None:
        """Add the counts of other rows."""
        self.rows += other.rows
        self.kept += other.kept
        for name in ("dropped", "defects", "notes", "labels"):
            getattr(self, name).update(getattr(other, name))
        for name in ("languages", "histograms"):
            for key, own in getattr(other, name).items():
                getattr(self, name).setdefault(key, Counter()).update(own)

    def plain(self) -> dict[str, Any]:
        """Return the counts as plain values, in an order that does not depend on how they were added."""
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self)}

    @classmethod
    def from_plain(cls, found: Mapping[str, Any]) -> "Counts":
        """Return the counts of plain values."""
        bins = {name: Counter({int(key): n for key, n in own.items()}) for name, own in found["histograms"].items()}
        codes = {name: Counter(own) for name, own in found["languages"].items()}
        counters = {name: Counter(found[name]) for name in ("dropped", "defects", "notes", "labels")}
        return cls(rows=found["rows"], kept=found["kept"], languages=codes, histograms=bins, **counters)

    def _bin(self, name: str, number: int) -> None:
        self.histograms.setdefault(name, Counter())[number] += 1


def texts(record: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    """Yield (field, language, text) of all texts of a record."""
    code = str(record.get("language") or languages.DEFAULT)
    for name in ("alt_text", "text"):
        for text in _list(record.get(name)):
            yield name, code, text
    captions = record.get("captions")
    for own, value in captions.items() if isinstance(captions, dict) else ():
        for text in _list(value):
            yield "captions", str(own), text
    for name in ("ocr", "questions"):
        for one in record.get(name) or ():
            yield name, str(one.get("language") or languages.DEFAULT), str(one.get("text") or one.get("question"))


def _list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [each for each in value or () if isinstance(each, str)]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(own) for key, own in sorted(value.items()) if own}
    return value
