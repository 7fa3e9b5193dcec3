"""Describe what a record holds, before any objective asks: its *profile*, and the size of its image.

A profile is a text such as `alt_text=de captions=de:1,en:1 questions=en:3`: for each field, how many items there are in
each language. Few records have a profile of their own, so the index keeps a number for each record and each profile
once. From it follows, for any objective and any languages, whether the record can be used, and how many items it has.
"""

import io
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data import fields, images, objectives
from data.skip import Skip

DEFECT = "!"  # in place of the languages: the field is there and cannot be used, which is counted where it is read
ANY = "*"  # in place of a language: of none in particular
UNKNOWN = DEFECT  # the profile of a record whose fields cannot be read
LARGEST_SIDE = 0xFFFF

Uses = Callable[[str], bool]
Counts = Mapping[str, int]


def profile(record: fields.Fields) -> str:
    """Return the profile of a record's fields."""
    parts = []
    for name, count in _FIELDS.items():
        if record.get("objects" if name == "boxes" else name) is None:
            continue
        try:
            found = count(record)
        except Skip as skip:
            if skip.defect:
                parts.append(f"{name}={DEFECT}")
            continue
        except Exception:  # any defect of a record is counted where it is read
            parts.append(f"{name}={DEFECT}")
            continue
        if found:
            counts = ",".join(f"{code}:{number}" if number > 1 else code for code, number in sorted(found.items()))
            parts.append(f"{name}={counts}")
    return " ".join(parts)


def num_items(profile: str, objective: str, uses: Uses) -> int:
    """Return how many items an objective finds in a record of this profile; 0 if it lacks the objective's field."""
    if profile == UNKNOWN:
        return 1
    name = _FIELD_BY_NEED.get(objectives.FIELDS[objective])
    if name is None:  # an objective of the user's: which records it can use is found when they are read
        return 1
    counts = parsed(profile).get(name, {})
    found = sum(number for code, number in counts.items() if code in (ANY, DEFECT) or uses(code))
    return found if getattr(objectives.load(objective), "ITEMS", False) else min(found, 1)


def weights(profiles: list[str], objective: str, uses: Uses, items: bool) -> NDArray[np.uint16]:
    """Return, by number of profile, how many items such a record gives an objective; without `items`, 1 at most."""
    found = (num_items(each, objective, uses) for each in profiles)
    return np.array([min(number, 0xFFFF if items else 1) for number in found], np.uint16)


def image_size(image: bytes | None) -> tuple[int, int]:
    """Return an image's width and height by its header, at most LARGEST_SIDE; zeros if it cannot be read."""
    if image is None:
        return 0, 0
    try:
        with Image.open(io.BytesIO(image), formats=images.FORMATS) as opened:
            return min(opened.width, LARGEST_SIDE), min(opened.height, LARGEST_SIDE)
    except Exception:  # decoders raise almost anything for corrupt bytes
        return 0, 0


@lru_cache(maxsize=1 << 16)
def parsed(profile: str) -> dict[str, dict[str, int]]:
    """Return the number of items of a profile by field and language."""
    found: dict[str, dict[str, int]] = {}
    for part in filter(None, profile.split(" ")):
        name, _, counts = part.partition("=")
        found[name] = {code: int(number or 1) for code, _, number in (one.partition(":") for one in counts.split(","))}
    return found


def _every(code: str) -> bool:
    return True


def _alt_text(record: fields.Fields) -> Counts:
    fields.alt_text(record)
    return {fields.language(record): 1}


def _document(record: fields.Fields) -> Counts:
    fields.document(record)
    return {fields.language(record): 1}


def _captions(record: fields.Fields) -> Counts:
    return dict.fromkeys(fields.captions(record, _every), 1)


def _ocr(record: fields.Fields) -> Counts:
    return dict.fromkeys((word.language for word in fields.ocr(record, _every)), 1)


def _questions(record: fields.Fields) -> Counts:
    return Counter(each.language for each in fields.questions(record, _every))


def _objects(record: fields.Fields) -> Counts:
    return {ANY: 1} if fields.objects(record, boxes=False) else {}


def _boxes(record: fields.Fields) -> Counts:
    return {ANY: 1} if any(each.box and fields.has_area(each.box) for each in fields.objects(record, True)) else {}


_FIELDS: dict[str, Callable[[Mapping[str, Any]], Counts]] = {
    "alt_text": _alt_text,
    "captions": _captions,
    "ocr": _ocr,
    "questions": _questions,
    "objects": _objects,
    "boxes": _boxes,
    "text": _document,
}
# By the need of an objective, as `objectives.FIELDS` names it.
_FIELD_BY_NEED = {
    "text": "text",
    "alt_text": "alt_text",
    "captions": "captions",
    "ocr (text)": "ocr",
    "questions (question, answer)": "questions",
    "objects (label)": "objects",
    "objects (label, box)": "boxes",
}
