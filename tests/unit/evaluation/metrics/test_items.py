"""Ids that do not match are counted, and never raise a score."""

import pytest

from evaluation.metrics import answers
from evaluation.metrics.items import Counts


def test_ids_are_matched_and_counted() -> None:
    references = {"a": ["dog"], "b": ["cat"], "c": []}
    score = answers.accuracy({"a": "Dog", "c": "x", "z": "y"}, references)
    assert score.by_id == {"a": 1, "b": 0} and score.value == 0.5
    assert score.counts == Counts(scored=2, without_prediction=1, without_references=1, unasked=1)


def test_nothing_to_score() -> None:
    with pytest.raises(ValueError, match="no item has references"):
        answers.accuracy({"a": "dog"}, {"a": []})
