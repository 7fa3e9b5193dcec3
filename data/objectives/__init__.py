"""The objectives, one module each; an objective's place in NAMES is its number in a row's `objectives`."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, cast

from data.objectives.base import AnyOptions, Objective, parse_options

NAMES = (
    "span_corruption",
    "split_captioning",
    "captioning",
    "ocr",
    "vqa",
    "vqg",
    "object_vqa",
    "detection",
    "task",
    "labels",
)

OF_TEXT = ("span_corruption",)  # whose examples have no image, whatever the record

# The field of a record that an objective requires, as a message names it.
FIELDS = {
    "span_corruption": "text",
    "split_captioning": "alt_text",
    "captioning": "captions",
    "ocr": "ocr (text)",
    "vqa": "questions (question, answer)",
    "vqg": "questions (question, answer)",
    "object_vqa": "objects (label)",
    "detection": "objects (label, box)",
    "task": "references (of a task's item)",
    "labels": "of its option fields",
}


def load(name: str) -> Objective:
    """Return the module of an objective: `make` makes an example, `read` parses a prediction."""
    return cast(Objective, import_module(f"data.objectives.{name}"))


def options(name: str, values: Mapping[str, Any], where: str = "options") -> AnyOptions:
    """Return an objective's options, typed and checked; `where` is their key.

    Raises ConfigurationError for an unknown option and a wrong value.
    """
    return parse_options(where, name, load(name).Options, values)
