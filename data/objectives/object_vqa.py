"""Object-aware VQA in English: the paper's four types of questions about objects in the image."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from common.errors import ConfigurationError
from data import fields
from data.objectives import base
from data.objectives.base import Example, Vocabulary

LIST = "Answer in {language}: List the objects present: <extra_id_0>"
IS = "Answer in {language}: Is {objects} in the image? <extra_id_0>"  # for one object or several
WHICH = "Answer in {language}: Which of {objects} are in the image? <extra_id_0>"
PROMPTS = (LIST, IS, WHICH)
SEPARATOR = ", "
LANGUAGE = "en"


@dataclass(frozen=True)
class Options(base.PromptOptions, base.LabelOptions, base.TargetOptions):
    """Options of object_vqa; an answer longer than `target_length` is skipped, because a list that is cut is wrong."""

    max_objects: int = 4
    """Most labels in a question, 2 or more."""

    OBJECTIVE = "object_vqa"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_objects < 2:
            raise ConfigurationError(f"max_objects={self.max_objects} must be 2 or more.")


def make(record: Mapping[str, Any], rng: np.random.Generator, options: Options, vocabulary: Vocabulary) -> Example:
    """Make a question of one of the four types; see `_question`."""
    example = _question(record, rng, options)
    if options.target_length is None:
        return example
    ids = vocabulary.encode(example.target_text)
    if len(ids) >= options.target_length:
        raise base.Skip("answer longer than a row")
    return replace(example, target_ids=ids)


def _question(record: Mapping[str, Any], rng: np.random.Generator, options: Options) -> Example:
    """Make a question of `objects`, whose boxes are not read, and of absent labels.

    Absent labels are those of `absent_labels`, else of the option `labels`; questions with the answer "No" need them.
    The types that a record allows are equally likely, and so are Yes and No. A list of objects is sorted by label; an
    answer to "Which of" keeps the question's order.
    """
    present = base.distinct([each.label for each in fields.objects(record, boxes=False)])
    there = set(present)  # `labels` may be thousands
    absent = base.distinct([label for label in fields.absent_labels(record) or options.labels if label not in there])
    if not present:
        raise base.Skip("no objects")
    # Without an absent label every answer would be Yes; with one object the types "all" and "one" are the same.
    kinds = ["list"]
    if absent:
        kinds += ["one", "which"] if len(present) == 1 else ["one", "which", "all"]
    kind = base.choose(rng, kinds, "")
    if kind == "list":
        return _example(LIST, [], SEPARATOR.join(sorted(present)), options)
    if kind == "which":
        asked = base.shuffled(rng, present)[: int(rng.integers(1, options.max_objects))]
        num_absent = int(rng.integers(1, options.max_objects - len(asked) + 1))
        asked = base.shuffled(rng, [*asked, *base.shuffled(rng, absent)[:num_absent]])
        return _example(WHICH, asked, SEPARATOR.join(label for label in asked if label in present), options)
    positive = bool(rng.integers(2))
    num_asked = 1 if kind == "one" else int(rng.integers(2, min(options.max_objects, len(present)) + 1))
    asked = base.shuffled(rng, present)[:num_asked]
    if not positive:
        asked = base.shuffled(rng, [*asked[: num_asked - 1], base.choose(rng, absent, "")])
    return _example(IS, asked, "Yes" if positive else "No", options)


def _example(prompt: str, asked: list[str], target: str, options: Options) -> Example:
    text = prompt.format(language=options.code(LANGUAGE), objects=SEPARATOR.join(asked))
    return Example(text, target, LANGUAGE)


def read(text: str) -> list[str]:
    """Return the labels in the answer, or ["Yes"] or ["No"]."""
    return [label.strip() for label in text.split(SEPARATOR.strip()) if label.strip()]
