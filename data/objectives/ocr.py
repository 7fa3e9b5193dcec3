"""OCR: all text of one language in the image, in reading order."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.objectives import base
from data.objectives.base import Example, Options, Vocabulary

PROMPTS = ("Generate the ocr_text in {language}: <extra_id_0>",)


def reading_order(items: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Items {text, box} sorted top-left to bottom-right: by line, then by left edge.

    An item belongs to the line above it if its middle is higher than the bottom of that line's first item; sorting by
    the top edge alone would swap neighbours whose boxes differ by a pixel.
    """
    lines: list[list[Mapping[str, Any]]] = []
    for item in sorted(items, key=lambda item: (item["box"][0], item["box"][1])):
        ymin, _, ymax, _ = item["box"]
        if lines and (ymin + ymax) / 2 < lines[-1][0]["box"][2]:
            lines[-1].append(item)
        else:
            lines.append([item])
    return [item for line in lines for item in sorted(line, key=lambda item: item["box"][1])]


def make(record: Mapping[str, Any], rng: np.random.Generator, options: Options, vocabulary: Vocabulary) -> Example:
    """Needs `ocr`: [{text, language, box}]. The language is drawn uniformly from those in the image."""
    items = [item for item in record.get("ocr") or [] if str(item["text"]).strip() and options.uses(item["language"])]
    language = base.choose(rng, base.distinct([item["language"] for item in items]), "no OCR text")
    texts = reading_order([item for item in items if item["language"] == language])
    target = " ".join(item["text"].strip() for item in texts)
    return Example(PROMPTS[0].format(language=options.code(language)), target, language)


def read(text: str) -> str:
    """The text in the image."""
    return text.strip()
