"""Fine-tuning on a task of official files: an item's prompt, and one of its references as target."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from data.objectives import base
from data.objectives.base import AnyOptions, Example, Vocabulary

PROMPTS = ()  # a task has its own (conf/task)
Options = AnyOptions


def make(record: Mapping[str, Any], rng: np.random.Generator, options: AnyOptions, vocabulary: Vocabulary) -> Example:
    """Make an example of an item (`data.tasks.source.ItemSource`); its target is a reference, drawn uniformly.

    Of ten annotators' answers, one that more of them gave is drawn as much more often.
    """
    references = [text for text in record.get("references") or () if text.strip()]  # VizWiz has empty answers
    target = base.choose(rng, references, "no reference")
    return Example(
        record["prompt"],
        target,
        record["language"],
        image=record["has_image"],
        references=tuple(references),
        closed=record["closed"],
    )


def read(text: str) -> str:
    """Return the answer."""
    return text.strip()
