"""Split-captioning (WebLI): the prompt gives the first words of an alt-text, the target is the rest."""

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np

from data import fields
from data.objectives import base
from data.objectives.base import Example, Options, Vocabulary

PROMPTS = ("Generate the alt_text in {language} at {position}: {given} <extra_id_0>",)

# Scripts written without spaces between words: Thai, Lao, Myanmar, Khmer, kana, Han.
UNSPACED = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3040, 0x30FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)
FIRST_MARK = "\u0300"  # the first combining mark; all characters before it are of spaced scripts


def word_starts(text: str) -> list[int]:
    """Return the position of each word's first character; `<pos>` in a prompt counts these words.

    The paper counts words without a definition for scripts without spaces. Here a word is a run between spaces; inside
    a run, each character of an unspaced script (with its combining marks) is a word of its own, and so is each run
    between such characters. The rule depends on characters, not on the language, so mixed text works.
    """
    if max(text, default="") < FIRST_MARK:
        return [word.start() for word in re.finditer(r"\S+", text)]
    starts = []
    after_space, after_unspaced = True, False
    for index, character in enumerate(text):
        if character.isspace():
            after_space = True
            continue
        unspaced = any(low <= ord(character) <= high for low, high in UNSPACED)
        mark = unicodedata.category(character).startswith("M")
        if after_space or (not mark and (unspaced or after_unspaced)):
            starts.append(index)
        after_space = False
        after_unspaced = unspaced or (mark and after_unspaced)
    return starts


def make(record: Mapping[str, Any], rng: np.random.Generator, options: Options, vocabulary: Vocabulary) -> Example:
    """Make an example of `alt_text` and `language` (default "en").

    The number of given words is uniform over 0 … words - 1 (as SimVLM's prefix, which may be empty): the target always
    has a word, and with no word given the prompt is captioning's.
    """
    texts, language = fields.alt_text(record), fields.language(record)
    if not options.uses(language):
        raise base.Skip("other language")
    text = base.one_of(rng, texts)
    starts = word_starts(text)
    position = int(rng.integers(len(starts)))
    given, rest = text[: starts[position]].rstrip(), text[starts[position] :]
    prompt = PROMPTS[0].format(language=options.code(language), position=position, given=given)
    return Example(prompt if given else prompt.replace(":  ", ": "), rest, language)


def read(text: str) -> str:
    """Return the rest of the alt-text."""
    return text.strip()
