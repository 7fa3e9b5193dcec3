"""Read OCR strings of images, for {ocr} in a prompt: TextVQA's Rosetta files (also TextCaps'), and rows."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.fields import Word
from data.objectives.ocr import reading_order
from data.tasks.item import get, read_json, text, texts


def read_ocr(files: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the strings of each image, by its id, from top-left to bottom-right where they have boxes.

    `TextVQA_Rosetta_OCR_v0.2_*.json` has `data`: rows of `image_id`, `ocr_tokens`, and `ocr_info` with `word` and
    `bounding_box` (`top_left_x`, `top_left_y`, `width`, `height`: shares of the image) [facebookresearch/mmf,
    textvqa.org/dataset]. Other files are lists or JSON Lines of rows with `image_id` (or `image`), and `ocr_tokens` or
    `ocr`, a list of strings.
    """
    found: dict[str, tuple[str, ...]] = {}
    for file in files:
        for row in _rows(file):
            found[text(file, row, "image_id", "image")] = _strings(file, row)
    return found


def _rows(file: str) -> Iterator[Any]:
    content = read_json(file)
    yield from get(file, content, "data") if isinstance(content, dict) else content


def _strings(file: str, row: Any) -> tuple[str, ...]:
    words = [read_word(file, info) for info in row.get("ocr_info") or ()]
    if words:
        return tuple(word.text for word in reading_order(words))
    return texts(file, get(file, row, "ocr_tokens", "ocr"), "text")


def read_word(file: str | Path, info: Any) -> Word:
    """Return a word of `ocr_info` with its box. Raises ConfigurationError for an entry without one of its names."""
    box = get(file, info, "bounding_box")
    left, top = float(get(file, box, "top_left_x")), float(get(file, box, "top_left_y"))
    bottom, right = top + float(get(file, box, "height")), left + float(get(file, box, "width"))
    return Word(text(file, info, "word"), "en", (top, left, bottom, right))
