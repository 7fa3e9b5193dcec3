"""Visual question generation (VQ2A): an English answer is given, its question in a language is to be generated."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from data.objectives.base import Example, Options, Vocabulary
from data.objectives.vqa import question_and_answer

PROMPTS = ("Generate a question in {language} for {answer}: <extra_id_0>",)


def make(record: Mapping[str, Any], rng: np.random.Generator, options: Options, vocabulary: Vocabulary) -> Example:
    """Needs `questions`, as vqa does."""
    language, question, answer = question_and_answer(record, rng, options)
    return Example(PROMPTS[0].format(language=options.code(language), answer=answer), question, language)


def read(text: str) -> str:
    """The question."""
    return text.strip()
