"""Visual question generation (VQ2A): the prompt gives an English answer, the target is its question in a language."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from data.objectives.base import Example, Options, Vocabulary
from data.objectives.vqa import draw_question

PROMPTS = ("Generate a question in {language} for {answer}: <extra_id_0>",)
ITEMS = True  # a record has several


def make(
    record: Mapping[str, Any],
    rng: np.random.Generator,
    options: Options,
    vocabulary: Vocabulary,
    item: int | None = None,
) -> Example:
    """Make an example of `questions`, as vqa does."""
    drawn = draw_question(record, rng, options, item)
    prompt = PROMPTS[0].format(language=options.code(drawn.language), answer=drawn.answer)
    return Example(prompt, drawn.question, drawn.language, references=drawn.wordings, item=drawn.item)


def read(text: str) -> str:
    """Return the question."""
    return text.strip()
