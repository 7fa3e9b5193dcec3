"""Read the OCR strings that TextVQA and TextCaps give for their images (`TextVQA_Rosetta_OCR_v0.2_train.json`)."""

from pathlib import Path
from typing import Any

from data.fields import Word
from data.objectives.ocr import reading_order
from data.tasks.item import get, read_json


def read_ocr(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return each image's words, from top-left to bottom-right as in the paper (appendix C.6).

    `ocr_info` has a box of each word, in fractions of the image; a file without it has `ocr_tokens` in reading order.
    """
    return {str(get(path, one, "image_id")): _words(one) for one in get(path, read_json(path), "data")}


def _words(one: dict[str, Any]) -> list[dict[str, Any]]:
    infos = one.get("ocr_info")
    if not infos:
        return [{"text": str(text), "language": "en"} for text in one.get("ocr_tokens", ())]
    words = [Word(str(info["word"]), "en", _box(info["bounding_box"])) for info in infos]
    return [{"text": word.text, "language": "en", "box": list(word.box or ())} for word in reading_order(words)]


def _box(box: dict[str, float]) -> tuple[float, float, float, float]:
    top, left = box["top_left_y"], box["top_left_x"]
    edges = (top, left, top + box["height"], left + box["width"])
    ymin, xmin, ymax, xmax = (min(max(float(edge), 0.0), 1.0) for edge in edges)
    return ymin, xmin, ymax, xmax
