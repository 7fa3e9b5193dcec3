"""Labels of an image, for a ViT that is pretrained as a classifier: its classes, or the labels in its captions.

The paper's ViT is trained on JFT's label sets (section 3.1). The list of labels in the tokenizer's place has all that
there are (`data.labels`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.errors import ConfigurationError
from data import fields
from data.objectives import base
from data.objectives.base import Example, Vocabulary
from data.objectives.detection import box_text

PROMPTS = ()
SEPARATOR = " | "


@dataclass(frozen=True)
class Options(base.LanguageOptions):
    """Options of labels."""

    fields: list[str] = field(default_factory=lambda: ["objects"])
    """Fields whose text holds labels: `objects` (their labels, with a box or without), `captions`, `alt_text`, `ocr`.
    Classes are labels of objects, hence the default."""
    boxes: bool = False
    """Give each label its box before it, as detection does, for `classifier.head=patches`; of objects and `ocr`, whose
    items without a box are left out. False by default: whole images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if wrong := [name for name in self.fields if name not in READERS]:
            raise ConfigurationError(f"fields has {wrong[0]!r}; choose from {', '.join(READERS)}.")
        if not self.fields:
            raise ConfigurationError(f"fields=[] leaves no label; choose from {', '.join(READERS)}.")
        if self.boxes and (without := [name for name in self.fields if name not in BOXED]):
            raise ConfigurationError(
                f"fields has {without[0]!r}, which has no boxes; choose from {', '.join(BOXED)}, or boxes=false."
            )


def _alt_text(record: fields.Fields, uses: fields.Uses) -> list[str]:
    return fields.alt_text(record) if uses(fields.language(record)) else []


READERS: Mapping[str, Callable[[fields.Fields, fields.Uses], list[str]]] = {
    "objects": lambda record, uses: [each.label for each in fields.objects(record, boxes=False)],
    "captions": lambda record, uses: [text for texts in fields.captions(record, uses).values() for text in texts],
    "alt_text": _alt_text,
    "ocr": lambda record, uses: [each.text for each in fields.ocr(record, uses)],
}


BOXED: Mapping[str, Callable[[fields.Fields, fields.Uses], list[str]]] = {
    "objects": lambda record, uses: [
        box_text(each.box, each.label) for each in fields.objects(record, boxes=True) if each.box is not None
    ],
    "ocr": lambda record, uses: [
        box_text(each.box, each.text) for each in fields.ocr(record, uses) if each.box is not None
    ],
}


def make(record: Mapping[str, Any], rng: np.random.Generator, options: Options, vocabulary: Vocabulary) -> Example:
    """Make an example of the option's `fields` that the record has, each text once.

    Their order is random: a row that is too short for all of them holds a random part.
    """
    readers = BOXED if options.boxes else READERS
    found = [
        text for name in options.fields if record.get(name) is not None for text in readers[name](record, options.uses)
    ]
    if not found:
        raise base.Skip("no text with labels")
    texts = base.shuffled(rng, base.distinct(found))
    ids = [id for text in texts for id in vocabulary.encode(text)]  # apart: no label is of two texts
    return Example("", SEPARATOR.join(texts), fields.language(record), target_ids=ids)


def read(text: str) -> list[str]:
    """Return the texts of a target."""
    return [part.strip() for part in text.split(SEPARATOR.strip()) if part.strip()]
