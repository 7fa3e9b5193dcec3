"""Judge texts: empty ones, boiler-plate, too few words, too many characters."""

import functools
import re
import unicodedata
from collections.abc import Sequence

from data import fields
from data.corpus.config import TextConfig
from data.objectives.split_captioning import word_starts
from data.skip import Skip

# Alt-texts that cameras, page templates and content systems write; whole texts only.
BOILERPLATE = (
    r"(img|dsc|dscn|dscf|pict?(ure)?|image|photo|screenshot|untitled|unnamed|default|thumb(nail)?)[-_ ]?\(?\d*\)?",
    r".*\.(jpe?g|png|gif|webp|bmp|tiff?|svg)",
    r"(https?://|www\.)\S+",
    r"[\W\d_]+",
    r"(click (here|to enlarge)|read more|enlarge|zoom|loading|placeholder|no image( available)?)",
    r"(logo|icon|banner|avatar)",
    r"(image|photo|bild|foto|изображение|фото|图片|画像)",
    r"[0-9a-f]{16,}",
)


def check_alt_text(texts: Sequence[str], config: TextConfig) -> list[str]:
    """Return the texts that can be used; raise Skip with the cause of the first one if there is none."""
    kept, cause = [], "empty text"
    for text in dict.fromkeys(" ".join(each.split()) for each in texts):
        if (found := _cause(text, config)) is None:
            kept.append(text)
        elif cause == "empty text":
            cause = found
    if not kept:
        raise Skip(cause)
    if len(kept) > config.max_texts:
        raise Skip("too many texts of an image")
    return kept


def cut_document(texts: Sequence[str], config: TextConfig) -> tuple[list[str], bool]:
    """Return the texts of a document without those that are blank, cut to the limit; and whether one was cut."""
    kept = [text for text in texts if text]
    if not kept:
        raise Skip("empty text")
    limit = config.max_document_characters
    return [text[:limit] for text in kept], any(len(text) > limit for text in kept)


def _cause(text: str, config: TextConfig) -> str | None:
    if not text or all(unicodedata.category(one)[0] in "CZ" for one in text[: config.max_characters]):
        return "empty text"
    if len(text) > config.max_characters:
        return "text too long"
    if _pattern(tuple(config.boilerplate)).fullmatch(text):
        return "boiler-plate text"
    return "text too short" if len(word_starts(text)) < config.min_words else None


@functools.cache
def _pattern(own: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{each})" for each in (*BOILERPLATE, *own)), re.IGNORECASE)


def texts(value: object) -> list[str]:
    """Return the texts of a field as data/fields reads it; raise Skip for another kind of value."""
    try:
        return fields.alt_text({"alt_text": value})
    except Skip as skip:
        raise Skip("empty text" if skip.cause in ("no caption", "empty caption") else skip.cause) from skip
