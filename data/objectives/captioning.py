"""Captioning in the language that the prompt names (CC3M-35L): split-captioning with no word given."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from data import fields
from data.objectives import base
from data.objectives.base import Example, Options, Vocabulary

PROMPTS = ("Generate the alt_text in {language} at 0: <extra_id_0>",)
ITEMS = True  # a record has several


def make(
    record: Mapping[str, Any],
    rng: np.random.Generator,
    options: Options,
    vocabulary: Vocabulary,
    item: int | None = None,
) -> Example:
    """Make an example of `captions`: draw one of the record's languages uniformly, then one of its captions."""
    captions = fields.captions(record, options.uses)
    language = base.choose(rng, list(captions), "no caption", item)
    caption = base.one_of(rng, captions[language])
    prompt = PROMPTS[0].format(language=options.code(language))
    return Example(prompt, caption, language, references=tuple(captions[language]), item=language)


def read(text: str) -> str:
    """Return the caption."""
    return text.strip()
