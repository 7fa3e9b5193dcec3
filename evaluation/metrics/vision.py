"""Score boxes and classes: detection's average precision, RefCOCO's accuracy, top-k of scored class names."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

from common.errors import ConfigurationError
from evaluation.box_scores import IOU_MATCH, Box, intersection_over_union
from evaluation.metrics.items import Counts, Score


class LabeledBox(NamedTuple):
    """A box (ymin, xmin, ymax, xmax) in pixels with its label; `confidence` orders the predicted ones."""

    label: str
    box: tuple[float, float, float, float]
    confidence: float = 1.0


AP_NAMES = ("ap", "ap_50", "ap_75", "ap_small", "ap_medium", "ap_large")


def check_pycocotools() -> None:
    """Raise ConfigurationError where pycocotools is not installed."""
    if find_spec("pycocotools") is None:
        raise ConfigurationError(
            "task.metrics has ap, which needs the package pycocotools; pip install pycocotools, or name other metrics."
        )


def average_precision(
    predictions: Mapping[str, Sequence[LabeledBox]], references: Mapping[str, Sequence[LabeledBox]]
) -> dict[str, float]:
    """Return COCO's AP in [0, 1], and AP by overlap and by size, as pycocotools computes them.

    Both map an image's id to its boxes. A score is -1 where no reference is of that size. Labels of predictions that no
    reference has are counted nowhere, as in COCO. Raises ConfigurationError where pycocotools is not installed.
    """
    check_pycocotools()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images = {id_: number for number, id_ in enumerate(references, 1)}
    labels = {label: n for n, label in enumerate(sorted({b.label for own in references.values() for b in own}), 1)}
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()
        truth.dataset = _dataset(references, images, labels)
        found.dataset = _dataset(predictions, images, labels)
        truth.createIndex()
        found.createIndex()
        judge = COCOeval(truth, found, "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return dict(zip(AP_NAMES, map(float, judge.stats), strict=False))


def _dataset(boxes: Mapping[str, Sequence[LabeledBox]], images: dict[str, int], labels: dict[str, int]) -> dict:
    annotations = [
        {"image_id": images[id_], "category_id": labels[one.label], "score": one.confidence, "iscrowd": 0}
        | {"bbox": [xmin, ymin, xmax - xmin, ymax - ymin], "area": (xmax - xmin) * (ymax - ymin)}
        for id_, own in boxes.items()
        for one in own
        for ymin, xmin, ymax, xmax in [one.box]
        if id_ in images and one.label in labels
    ]
    return {
        "images": [{"id": number} for number in images.values()],
        "categories": [{"id": number, "name": label} for label, number in labels.items()],
        "annotations": [annotation | {"id": number} for number, annotation in enumerate(annotations, 1)],
    }


def box_accuracy(predictions: Mapping[str, Box], references: Mapping[str, Box], threshold: float = IOU_MATCH) -> Score:
    """Return the share of references whose predicted box overlaps by `threshold` or more (RefCOCO)."""
    by_id = {
        id_: float(id_ in predictions and intersection_over_union(predictions[id_], box) >= threshold)
        for id_, box in references.items()
    }
    return Score(sum(by_id.values()) / len(by_id), _counts(predictions, references), by_id)


def top_k(scores: Mapping[str, Sequence[float]], classes: Mapping[str, int], k: int = 1) -> Score:
    """Return the share of items whose class is among the `k` best scored; of equal scores the lower class wins.

    `scores`: each item's score of every class, such as the log-likelihoods of all class names.
    """
    by_id = {}
    for id_, own in classes.items():
        ranked = np.argsort(-np.asarray(scores.get(id_, ()), np.float64), kind="stable")
        by_id[id_] = float(own in ranked[:k])
    return Score(sum(by_id.values()) / len(by_id), _counts(scores, classes), by_id)


def _counts(predictions: Mapping[str, object], references: Mapping[str, object]) -> Counts:
    return Counts(
        scored=len(references),
        without_prediction=sum(id_ not in predictions for id_ in references),
        unasked=sum(id_ not in references for id_ in predictions),
    )
