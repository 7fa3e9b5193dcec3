"""Read, check and type the fields of a record; docs/data.md lists them.

Each function reads one field, and only the languages or values that its caller uses, so that a field that an objective
does not use cannot spoil its examples. A field that is absent or null is missing: Skip is raised if nothing is left,
and it is no defect. A blank text (space, control and format characters alone) is left out, and is a defect if no other
text is left. A value of another kind than docs/data.md lists is Malformed, always a defect; values are not converted,
but for JSON in a string.
"""

import json
import reprlib
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from common.errors import ConfigurationError
from common.values import one_of
from data import languages
from data.skip import Skip

# Coordinates that were computed in 32 bits may lie this far outside the image.
ROUNDING = 1e-6

Fields = Mapping[str, Any]
Box = tuple[float, float, float, float]
Uses = Callable[[str], bool]


class Malformed(Skip):
    """Report a field of another kind than is due: the cause names the field, the detail shows the value."""

    def __init__(self, field: str, value: Any, due: str):
        super().__init__(f"malformed {field}", defect=True, detail=f"{field} is {shown(value)} where {due} is due")


class Word(NamedTuple):
    """Hold a text in the image; `box` is None if the record has none."""

    text: str
    language: str
    box: Box | None


class Question(NamedTuple):
    """Hold a question in all its wordings, and its answers in theirs; neither list is empty."""

    language: str
    questions: list[str]
    answers: list[str]


class Object(NamedTuple):
    """Hold a thing in the image; `box` is None if the record has none, or if the caller wants none."""

    label: str
    box: Box | None


NAMES = ("alt_text", "language", "captions", "ocr", "questions", "objects", "absent_labels", "text")
STRUCTURED = ("captions", "ocr", "questions", "objects", "absent_labels")  # may be JSON in a string


def parse(json_bytes: bytes | None, text: bytes | None, field_map: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return a sample's fields; `alt_text` is the first of `alt_text`, `caption` and KEY.txt that is not blank.

    `field_map`: where a field has another name in the JSON, `a.b` for b in an object a; captions may lie in one field
    for each language, `caption_*`.

    Raises Skip, a defect, for JSON that cannot be parsed or holds no object. A blank `caption` or KEY.txt is as good as
    missing, because img2dataset writes one for a caption that it did not have.
    """
    try:
        fields = {} if json_bytes is None else json.loads(json_bytes)
    except Exception as error:  # RecursionError too, and ValueError for a number of 5000 digits
        raise Skip("broken JSON", defect=True, detail=f"{type(error).__name__}: {error}") from error
    if not isinstance(fields, dict):
        raise Skip("broken JSON", defect=True, detail=f"it holds {shown(fields)} where an object is due")
    placed = {name: _found(fields, place) for name, place in (field_map or {}).items()}
    fields |= placed
    for name, value in placed.items():
        if value is None:
            del fields[name]
    for name in STRUCTURED:
        if isinstance(fields.get(name), str):
            fields[name] = _decoded_json(fields[name])
    if _is_blank(fields.get("alt_text")):
        beside = next((value for value in (fields.get("caption"), _decoded(text)) if not _is_blank(value)), None)
        if beside is not None:
            fields["alt_text"] = beside
    return fields


def _found(fields: Fields, place: str) -> Any:
    """Return the value at a place of a record, None if there is none."""
    if place in fields:
        return fields[place]
    outer, dot, inner = place.partition(".")
    if dot:
        value = fields.get(outer)
        if isinstance(value, str):
            value = _decoded_json(value)
        return _found(value, inner) if isinstance(value, dict) else None
    before, star, after = place.partition("*")
    shortest = len(before) + len(after) + 1
    matching = [name for name in fields if len(name) >= shortest and name.startswith(before) and name.endswith(after)]
    return {name[len(before) : len(name) - len(after)]: fields[name] for name in matching} or None if star else None


def holds(fields: Fields, place: str) -> bool:
    """Return whether a record has a place of a field map, be its value null."""
    return place in fields or _found(fields, place) is not None


def _decoded_json(text: str) -> Any:
    """Return the value of JSON in a string, as a column of text holds it (a TSV that img2dataset read).

    Blank is missing, and any other string stays, and is malformed as a value.
    """
    try:
        return json.loads(text) if text.strip() else None
    except Exception:  # RecursionError too
        return text


def alt_text(fields: Fields) -> list[str]:
    """Return the alt-text in each of its wordings, at least one."""
    return _some(_texts(fields.get("alt_text"), "alt_text"), "caption")


def document(fields: Fields) -> list[str]:
    """Return the texts of `text`, at least one."""
    return _some(_texts(fields.get("text"), "text"), "text")


def language(fields: Fields) -> str:
    """Return the language of `alt_text` and `text`."""
    return _language(fields.get("language"), "language")


def captions(fields: Fields, uses: Uses) -> dict[str, list[str]]:
    """Return the captions of each language that is used, at least one."""
    value = fields.get("captions")
    if value is not None and not isinstance(value, dict):
        raise Malformed("captions", value, "{language: text}")
    found: dict[str, list[str]] = {}
    for code, text in (value or {}).items():
        spelled = languages.canonical(code)
        if spelled is None:
            raise Malformed("captions", code, "the code of a language")
        if uses(spelled):
            found.setdefault(spelled, []).extend(_texts(text, "captions"))
    filled = {code: texts for code, every in found.items() if (texts := [text for text in every if text])}
    if not filled:
        _some([text for every in found.values() for text in every], "caption")
    return filled


def ocr(fields: Fields, uses: Uses) -> list[Word]:
    """Return the texts in the image, of the languages that are used; there may be none."""
    found = []
    for item in _items(fields, "ocr"):
        code = _language(item.get("language"), "ocr.language")
        if uses(code) and item.get("text") is not None:
            text = _text(item["text"], "ocr.text")
            if text:
                found.append(Word(text, code, _box(item.get("box"), "ocr.box")))
    return found


def questions(fields: Fields, uses: Uses) -> list[Question]:
    """Return the questions that have an answer, of the languages that are used; at least one."""
    found: list[Question] = []
    blank = None
    for item in _items(fields, "questions"):
        code = _language(item.get("language"), "questions.language")
        if not uses(code):
            continue
        asked, answers = (_texts(item.get(name), f"questions.{name}") for name in ("question", "answer"))
        if any(asked) and any(answers):
            found.append(Question(code, [*filter(None, asked)], [*filter(None, answers)]))
        elif asked and answers:
            blank = "answer" if any(asked) else "question"
    if not found:
        raise Skip(f"empty {blank}", defect=True) if blank else Skip("no question")
    return found


def objects(fields: Fields, boxes: bool) -> list[Object]:
    """Return the things in the image that have a label, with their boxes if `boxes`; there may be none."""
    found = []
    for item in _items(fields, "objects"):
        if item.get("label") is not None:
            label = _label(item["label"], "objects.label")
            found.append(Object(label, _box(item.get("box"), "objects.box") if boxes else None))
    return found


def absent_labels(fields: Fields) -> list[str]:
    """Return the labels of things that are not in the image; there may be none."""
    return [_label(value, "absent_labels") for value in _list(fields, "absent_labels")]


def has_area(box: Box) -> bool:
    """Return whether a box has height and width."""
    ymin, xmin, ymax, xmax = box
    return ymin < ymax and xmin < xmax


def shown(value: Any) -> str:
    """Return the kind of a value and the value, in at most some 100 characters."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    try:
        return f"{type(value).__name__} {_REPR.repr(value)[:80]}"
    except ValueError:  # an integer of more digits than Python prints
        return f"{type(value).__name__}"


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist = 2, 3, 5


def _some(texts: list[str], noun: str) -> list[str]:
    filled = [text for text in texts if text]
    if not filled:
        raise Skip(f"empty {noun}", defect=True) if texts else Skip(f"no {noun}")
    return filled


def _texts(value: Any, field: str) -> list[str]:
    """Return a text as a list of one, a list of texts as it is, null as an empty list; a blank text becomes ""."""
    if isinstance(value, str):
        return [_text(value, field)]
    if value is None:
        return []
    if not isinstance(value, list):
        raise Malformed(field, value, "text")
    return [_text(each, field) for each in value if each is not None]


def _text(value: Any, field: str) -> str:
    """Return the text without the space around it, "" if it is blank."""
    if not isinstance(value, str):
        raise Malformed(field, value, "text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise Malformed(field, value[max(error.start - 20, 0) :], "text without half a surrogate pair") from None
    text = value.strip()
    return text if _is_visible(text) else ""


def _is_visible(text: str) -> bool:
    """Return whether any character is neither space nor a control or format character."""
    return text[:1].isalnum() or any(unicodedata.category(c) not in _UNSEEN for c in text)


_UNSEEN = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})


def _is_blank(value: Any) -> bool:
    """Return whether a value is missing or a blank text; a value of another kind is not blank, but malformed."""
    if isinstance(value, list):
        return all(each is None or (isinstance(each, str) and _is_blank(each)) for each in value)
    return value is None or (isinstance(value, str) and not _is_visible(value))


def _decoded(text: bytes | None) -> str | bytes | None:
    """Return the text of KEY.txt; bytes that are no UTF-8 stay bytes, and are malformed as a text."""
    try:
        return text if text is None else text.decode("utf-8-sig")
    except UnicodeDecodeError:
        return text


def _language(value: Any, field: str) -> str:
    if value is None or value == "":
        return languages.DEFAULT
    code = languages.canonical(value) if isinstance(value, str) else None
    if code is None:
        raise Malformed(field, value, "the code of a language")
    return code


def _label(value: Any, field: str) -> str:
    label = _text(value, field)
    if not label:
        raise Malformed(field, value, "a name")
    return label


def _list(fields: Fields, field: str) -> list[Any]:
    value = fields.get(field)
    if value is None:
        return []
    if not isinstance(value, list):
        raise Malformed(field, value, "a list")
    return [each for each in value if each is not None]


def _items(fields: Fields, field: str) -> list[dict[str, Any]]:
    items = _list(fields, field)
    for item in items:
        if not isinstance(item, dict):
            raise Malformed(field, item, "an object")
    return items


def _box(value: Any, field: str) -> Box | None:
    if value is None:
        return None
    if isinstance(value, list | tuple) and len(value) == 4 and all(map(_is_number, value)):
        ymin, xmin, ymax, xmax = value
        # NaN compares false, so it is malformed too.
        if -ROUNDING <= ymin <= ymax <= 1 + ROUNDING and -ROUNDING <= xmin <= xmax <= 1 + ROUNDING:
            return float(ymin), float(xmin), float(ymax), float(xmax)
    raise Malformed(field, value, "[ymin, xmin, ymax, xmax] in fractions of the image, 0 to 1,")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_field_map(where: str, field_map: Mapping[str, str]) -> None:
    """Raise ConfigurationError for a field that no objective reads, for a blank name, and for a `*` that has no use."""
    for name, place in field_map.items():
        one_of(where, name, NAMES)
        if not place.strip("."):
            raise ConfigurationError(f"{where}.{name}={place!r} names no field; write its name in the JSON.")
        if "*" in place and (name != "captions" or place.count("*") > 1 or "*" in place.rpartition(".")[0]):
            raise ConfigurationError(
                f"{where}.{name}={place} has a * that cannot be read; one * is for captions in a field of each "
                "language (captions: caption_*)."
            )
