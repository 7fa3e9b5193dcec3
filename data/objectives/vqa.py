"""Visual question answering, native and cross-lingual (VQ2A): a question in any language, answered in English."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from data import fields
from data.objectives import base
from data.objectives.base import Example, Options, Vocabulary

PROMPTS = ("Answer in {language}: {question} <extra_id_0>",)
ANSWER_LANGUAGE = "en"  # as in the paper: short answers are mistranslated out of context


def question_and_answer(record: Mapping[str, Any], rng: np.random.Generator, options: Options) -> tuple[str, str, str]:
    """Return (language, question, answer) of one of the record's `questions`, drawn uniformly."""
    language, asked, answers = base.choose(rng, fields.questions(record, options.uses), "no question")
    return language, base.one_of(rng, asked), base.one_of(rng, answers)


def make(record: Mapping[str, Any], rng: np.random.Generator, options: Options, vocabulary: Vocabulary) -> Example:
    """Make an example of `questions`; its language is the question's."""
    language, question, answer = question_and_answer(record, rng, options)
    prompt = PROMPTS[0].format(language=options.code(ANSWER_LANGUAGE), question=question)
    return Example(prompt, answer, language)


def read(text: str) -> str:
    """Return the answer."""
    return text.strip()
