"""Object-aware VQA in English: which objects are in the image, asked in the paper's four ways."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from common.errors import ConfigurationError
from data import fields
from data.objectives import base
from data.objectives.base import Example, Vocabulary

LIST = "Answer in {language}: List the objects present: <extra_id_0>"
IS = "Answer in {language}: Is {objects} in the image? <extra_id_0>"  # One object, or several: worded alike.
WHICH = "Answer in {language}: Which of {objects} are in the image? <extra_id_0>"
PROMPTS = (LIST, IS, WHICH)
SEPARATOR = ", "
LANGUAGE = "en"


@dataclass(frozen=True)
class Options(base.PromptOptions, base.LabelOptions):
    """max_objects: the most labels that a question names, 2 or more.

    target_length: tokens of an answer, with EOS, at most; None is what a row holds. A list that is cut would be untrue,
    so that a longer one is skipped.
    """

    max_objects: int = 4
    target_length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_objects < 2:
            raise ConfigurationError(f"max_objects={self.max_objects} must be 2 or more.")
        if self.target_length is not None and self.target_length < 2:
            raise ConfigurationError(f"target_length={self.target_length} must be 2 or more.")

    def for_rows(self, encoder_length: int, decoder_length: int) -> "Options":
        """See base.AnyOptions."""
        length = base.row_length("object_vqa: target_length", self.target_length, "decoder_length", decoder_length)
        return replace(self, target_length=length)


def make(record: Mapping[str, Any], rng: np.random.Generator, options: Options, vocabulary: Vocabulary) -> Example:
    """A question of one of the four types; see `_asked`."""
    example = _asked(record, rng, options)
    if options.target_length is None:
        return example
    ids = vocabulary.encode(example.target_text)
    if len(ids) >= options.target_length:
        raise base.Skip("answer longer than a row")
    return replace(example, target_ids=ids)


def _asked(record: Mapping[str, Any], rng: np.random.Generator, options: Options) -> Example:
    """Needs `objects`, of which no box is looked at.

    What is not there, of `absent_labels` or else of the option `labels`, makes questions possible whose answer is no.

    The types that a record allows are equally likely, and so are Yes and No. A list of objects is sorted by label, an
    answer to "Which of" keeps the question's order.
    """
    present = base.distinct([each.label for each in fields.objects(record, boxes=False)])
    there = set(present)  # `labels` may be thousands
    absent = base.distinct([label for label in fields.absent_labels(record) or options.labels if label not in there])
    if not present:
        raise base.Skip("no objects")
    # Without a label known to be absent every answer would be Yes, and with one object "all of them" is "it".
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
    """The labels in the answer, or ["Yes"] or ["No"]."""
    return [label.strip() for label in text.split(SEPARATOR.strip()) if label.strip()]
