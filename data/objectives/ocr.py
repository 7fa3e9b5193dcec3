"""OCR: all text of one language in the image, in reading order."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data import fields
from data.fields import Word
from data.objectives import base
from data.objectives.base import Example, Options, Vocabulary

PROMPTS = ("Generate the ocr_text in {language}: <extra_id_0>",)
ITEMS = True  # a record has several


def reading_order(words: Sequence[Word]) -> list[Word]:
    """Sort words from top-left to bottom-right: by line, then by left edge; in the record's order if one has no box.

    A word belongs to the line above it if its middle is higher than the bottom of that line's first word; sorting by
    the top edge alone would swap neighbors whose boxes differ by a pixel.
    """
    boxed = [(word.box, word) for word in words if word.box is not None]
    if len(boxed) < len(words):
        return list(words)
    lines: list[list[tuple[fields.Box, Word]]] = []
    for box, word in sorted(boxed, key=lambda each: each[0][:2]):
        ymin, _, ymax, _ = box
        if lines and (ymin + ymax) / 2 < lines[-1][0][0][2]:
            lines[-1].append((box, word))
        else:
            lines.append([(box, word)])
    return [word for line in lines for _, word in sorted(line, key=lambda each: each[0][1])]


def make(
    record: Mapping[str, Any],
    rng: np.random.Generator,
    options: Options,
    vocabulary: Vocabulary,
    item: int | None = None,
) -> Example:
    """Make an example of `ocr`: draw one of the languages in the image uniformly."""
    words = fields.ocr(record, options.uses)
    language = base.choose(rng, base.distinct([word.language for word in words]), "no OCR text", item)
    target = " ".join(word.text for word in reading_order([word for word in words if word.language == language]))
    return Example(PROMPTS[0].format(language=options.code(language)), target, language, item=language)


def read(text: str) -> str:
    """Return the text in the image."""
    return text.strip()
