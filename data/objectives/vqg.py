"""Visual question generation (VQ2A): the prompt gives an English answer, the target is its question in a language."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from data.objectives.base import Example, Options, Vocabulary
from data.objectives.vqa import question_and_answer

PROMPTS = ("Generate a question in {language} for {answer}: <extra_id_0>",)


def make(record: Mapping[str, Any], rng: np.random.Generator, options: Options, vocabulary: Vocabulary) -> Example:
    """Make an example of `questions`, as vqa does."""
    language, question, answer = question_and_answer(record, rng, options)
    return Example(PROMPTS[0].format(language=options.code(language), answer=answer), question, language)


def read(text: str) -> str:
    """Return the question."""
    return text.strip()
