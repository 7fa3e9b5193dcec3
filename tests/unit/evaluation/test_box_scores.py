"""Scores of boxes against values worked out by hand."""

import pytest

from evaluation import box_scores as scores


def test_intersection_over_union() -> None:
    assert scores.intersection_over_union((0, 0, 10, 10), (0, 5, 10, 15)) == pytest.approx(1 / 3)
    assert scores.intersection_over_union((0, 0, 1, 1), (2, 2, 3, 3)) == 0


def test_box_f1_wants_label_and_overlap_once_each() -> None:
    reference = [("cat", (0, 0, 10, 10)), ("dog", (20, 20, 30, 30))]
    assert scores.box_f1(reference, reference) == 1
    assert scores.box_f1([("dog", (0, 0, 10, 10))], reference) == 0
    twice = [("cat", (0, 0, 10, 10)), ("cat", (0, 0, 10, 9))]
    assert scores.box_f1(twice, reference) == pytest.approx(2 * 1 / 4)
    assert scores.box_f1([("cat", (0, 0, 10, 5))], reference[:1]) == 1  # an overlap of exactly one half
    assert scores.box_f1([], []) == 1


def test_greedy_matching_gives_the_largest_overlap_first() -> None:
    predicted = [("cat", (0, 0, 10, 8)), ("cat", (0, 0, 10, 10))]
    reference = [("cat", (0, 0, 10, 10)), ("cat", (0, 0, 10, 7))]
    assert scores.box_matches(predicted, reference) == 2
