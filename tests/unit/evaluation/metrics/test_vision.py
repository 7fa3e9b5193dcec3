"""Boxes and classes."""

import pytest

from evaluation.metrics import vision
from evaluation.metrics.vision import LabeledBox

BOX = (0.0, 0.0, 50.0, 50.0)


def test_average_precision_counts_missing_and_wrong_boxes() -> None:
    pytest.importorskip("pycocotools")
    references = {"1": [LabeledBox("dog", BOX)], "2": [LabeledBox("dog", BOX)]}
    assert vision.average_precision(references, references)["ap"] == pytest.approx(1)
    half = vision.average_precision({"1": [LabeledBox("dog", BOX), LabeledBox("zebra", BOX)]}, references)
    assert half["ap_50"] == pytest.approx(51 / 101)  # recalls 0, 0.01, … 0.50 of COCO's 101
    assert half["ap_small"] == -1


def test_box_accuracy() -> None:
    score = vision.box_accuracy({"1": (0, 0, 50, 25), "2": (0, 0, 50, 24), "z": BOX}, dict.fromkeys("123", BOX))
    assert score.by_id == {"1": 1, "2": 0, "3": 0}
    assert score.counts.without_prediction == 1 and score.counts.unasked == 1


def test_top_k() -> None:
    scores = {"1": [0.1, 0.9, 0.5], "2": [0.3, 0.3, 0.3]}
    assert vision.top_k(scores, {"1": 2, "2": 0, "3": 0}).by_id == {"1": 0, "2": 1, "3": 0}
    assert vision.top_k(scores, {"1": 2, "2": 1}, 2).value == 1
