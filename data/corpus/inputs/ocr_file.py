"""Read the OCR strings that TextVQA and TextCaps give for their images (`TextVQA_Rosetta_OCR_v0.2_train.json`)."""

from pathlib import Path
from typing import Any

from data.fields import Word
from data.objectives.ocr import reading_order
from data.tasks.item import get, read_json
from data.tasks.ocr import read_word


def read_ocr(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return each image's words, from top-left to bottom-right as in the paper (appendix C.6).

    `ocr_info` has a box of each word, in fractions of the image; a file without it has `ocr_tokens` in reading order.
    """
    return {str(get(path, one, "image_id")): _words(path, one) for one in get(path, read_json(path), "data")}


def _words(path: Path, one: dict[str, Any]) -> list[dict[str, Any]]:
    infos = one.get("ocr_info")
    if not infos:
        return [{"text": str(text), "language": "en"} for text in one.get("ocr_tokens", ())]
    words = [_inside(read_word(path, info)) for info in infos]
    return [{"text": word.text, "language": "en", "box": list(word.box or ())} for word in reading_order(words)]


def _inside(word: Word) -> Word:
    """Cut the edges of a word's box that lie outside the image."""
    ymin, xmin, ymax, xmax = (min(max(edge, 0.0), 1.0) for edge in word.box or ())
    return Word(word.text, word.language, (ymin, xmin, ymax, xmax))
