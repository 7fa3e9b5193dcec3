"""Visual question answering, native and cross-lingual (VQ2A): a question in any language, answered in English."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from data import fields
from data.objectives import base
from data.objectives.base import Example, Options, Vocabulary

PROMPTS = ("Answer in {language}: {question} <extra_id_0>",)
ITEMS = True  # a record has several
ANSWER_LANGUAGE = "en"  # as in the paper: short answers are mistranslated out of context


class Drawn(NamedTuple):
    """One of a record's questions, with one of its wordings and one of its answers."""

    language: str
    question: str
    answer: str
    wordings: tuple[str, ...]
    """Of the question."""
    answers: tuple[str, ...]
    item: str
    """The question's number in the record."""


def draw_question(
    record: Mapping[str, Any], rng: np.random.Generator, options: Options, item: int | None = None
) -> Drawn:
    """Draw one of the record's `questions` uniformly, or take the one of this number."""
    questions = fields.questions(record, options.uses)
    number = base.choose(rng, range(len(questions)), "no question", item)
    language, asked, answers = questions[number]
    question, answer = base.one_of(rng, asked), base.one_of(rng, answers)
    return Drawn(language, question, answer, tuple(asked), tuple(answers), str(number))


def make(
    record: Mapping[str, Any],
    rng: np.random.Generator,
    options: Options,
    vocabulary: Vocabulary,
    item: int | None = None,
) -> Example:
    """Make an example of `questions`; its language is the question's."""
    drawn = draw_question(record, rng, options, item)
    prompt = PROMPTS[0].format(language=options.code(ANSWER_LANGUAGE), question=drawn.question)
    return Example(prompt, drawn.answer, drawn.language, references=drawn.answers, item=drawn.item)


def read(text: str) -> str:
    """Return the answer."""
    return text.strip()
