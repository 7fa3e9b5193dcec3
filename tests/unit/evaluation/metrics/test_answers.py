"""ANLS, SQuAD's scores and exact answers."""

import pytest

from evaluation.metrics import answers


@pytest.mark.parametrize(
    "prediction, references, expected",
    [
        ("Coca Cola", ["coca cola"], 1),
        ("coca colo", ["coca  cola", "pepsi"], 8 / 9),
        ("pepsi", ["coca cola"], 0),
        ("ab", ["ac"], 0.5),  # at the threshold
        ("abc", ["axy"], 0),
        ("", [""], 1),
    ],
)
def test_anls(prediction: str, references: list[str], expected: float) -> None:
    assert answers.anls({"1": prediction}, {"1": references}).value == pytest.approx(expected)


def test_squad() -> None:
    scores = answers.squad({"1": "the red Dog!", "2": "cat"}, {"1": ["a red dog", "x"], "2": ["big cat"]})
    assert scores["exact_match"].by_id == {"1": 1, "2": 0}
    assert scores["f1"].by_id == {"1": 1, "2": pytest.approx(2 / 3)}
