"""Detection as text: boxes of the classes in the prompt, as plain integers without new tokens."""

import bisect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from common.errors import ConfigurationError
from data import fields
from data.objectives import base
from data.objectives.base import Example, Vocabulary

PROMPTS = ("detect {classes}",)
SEPARATOR = " and "
LANGUAGE = "en"
NUM_BINS = 1000  # coordinates are 0-999

_BOX = re.compile(r"(\d+) (\d+) (\d+) (\d+) (.+?)(?= \d+ \d+ \d+ \d+ |$)")


class Box(NamedTuple):
    """Hold a labeled box; coordinates are fractions of the image's height and width, 0..1."""

    ymin: float
    xmin: float
    ymax: float
    xmax: float
    label: str


@dataclass(frozen=True)
class Options(base.LabelOptions, base.TargetOptions):
    """Options of detection; boxes beyond `target_length` are left out whole."""

    max_negatives: int = 3
    """Most absent classes in a prompt."""
    order: str = "random"
    """Order of the boxes in the target: "random" (Pix2Seq's) or "reading" (by ymin, then xmin)."""

    OBJECTIVE = "detection"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_negatives < 0:
            raise ConfigurationError(f"max_negatives={self.max_negatives} must be 0 or more.")
        if self.order not in ("random", "reading"):
            raise ConfigurationError(f"order={self.order!r} must be 'random' or 'reading'.")


def box_bins(box: Sequence[float], num_bins: int) -> list[int]:
    """Return the bin of each coordinate, a fraction; coordinates outside the image are in the first or last bin."""
    return [min(max(int(value * num_bins), 0), num_bins - 1) for value in box]


def box_text(box: Sequence[float], label: str) -> str:
    """Return `ymin xmin ymax xmax label`, each coordinate as its bin of 1000."""
    return " ".join([*map(str, box_bins(box, NUM_BINS)), label])


def make(record: Mapping[str, Any], rng: np.random.Generator, options: Options, vocabulary: Vocabulary) -> Example:
    """Make an example of `objects` with boxes, and of `absent_labels` if the record has them.

    The prompt names, in random order, every class that has a box and 0 … max_negatives absent ones, from the record's
    `absent_labels`, else from the option `labels`. An object without a box, or with a box of no area, is not detected;
    its class is not absent either. If the target is too long for a row, whole boxes are left out from its end, and
    classes without a box left are not in the prompt.
    """
    objects = fields.objects(record, boxes=True)
    boxes = [Box(*each.box, each.label) for each in objects if each.box is not None and fields.has_area(each.box)]
    if not boxes:
        raise base.Skip("no boxes" if objects else "no objects")
    seen = {each.label for each in objects}
    absent = [label for label in fields.absent_labels(record) or options.labels if label not in seen]
    negatives = base.shuffled(rng, absent)[: int(rng.integers(options.max_negatives + 1))]
    classes = base.shuffled(rng, [*base.distinct([box.label for box in boxes]), *negatives])
    boxes = base.shuffled(rng, boxes) if options.order == "random" else sorted(boxes, key=lambda box: box[:2])
    if options.target_length is None:
        ids = None
    else:
        kept, ids = _fitting([box_text(box[:4], box.label) for box in boxes], options.target_length, vocabulary)
        left_out = {box.label for box in boxes} - {box.label for box in boxes[:kept]}
        boxes, classes = boxes[:kept], [label for label in classes if label not in left_out]
    target = " ".join(box_text(box[:4], box.label) for box in boxes)
    return Example(PROMPTS[0].format(classes=SEPARATOR.join(classes)), target, LANGUAGE, target_ids=ids)


def _fitting(texts: list[str], length: int, vocabulary: Vocabulary) -> tuple[int, list[int]]:
    """Return how many of the leading texts have at most `length` tokens, EOS among them, and their ids."""
    ids = vocabulary.encode(" ".join(texts))
    if len(ids) < length:
        return len(texts), ids

    def too_long(number: int) -> bool:
        return len(vocabulary.encode(" ".join(texts[:number]))) >= length

    kept = bisect.bisect_left(range(1, len(texts)), True, key=too_long)
    if not kept:
        raise base.Skip("no box fits a row")
    return kept, vocabulary.encode(" ".join(texts[:kept]))


def read(text: str) -> list[Box]:
    """Return the boxes of a text, each coordinate the middle of its bin; text that is no box is left out.

    A label may begin with a number ("2 door car"); a number at its end is read as part of the next box.
    """
    boxes = []
    for match in _BOX.finditer(text.strip()):
        ymin, xmin, ymax, xmax = ((min(int(bin), NUM_BINS - 1) + 0.5) / NUM_BINS for bin in match.groups()[:4])
        boxes.append(Box(ymin, xmin, ymax, xmax, match.group(5)))
    return boxes
