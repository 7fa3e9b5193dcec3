"""VQA accuracy: the script's rule as a table of cases, and the rules of others beside it.

The script (GT-Vision-Lab/VQA at a013f00) was run once beside `official` on 20,000 random questions: 1.4e-14 apart.
"""

import pytest

from evaluation.metrics.vqa import RULES, normalized, vqa_accuracy

NORMALIZED = {
    "The dog.": "dog",
    "two dogs": "2 dogs",
    "none": "0",
    "red/white": "red white",
    "red, white": "red white",
    "1,000 km/h": "1000 kmh",  # a comma between digits deletes every mark
    "t-shirt": "t shirt",
    "10:30": "10:30",
    "3.5": "3.5",
    "St. Louis": "st louis",
    "dont": "don't",
    "he'dve": "he'd've",
    "couldnt've": "couldn't've",
    "dog's": "dog's",
}
TEN = 10
CASES = [  # prediction, answers, accuracy by rule: official, script_2017, harness, simple
    ("dog", ["dog"] * TEN, (1, 1, 1, 1)),
    ("the dog", ["dog"] * TEN, (0, 1, 1, 0)),
    ("two", ["two"] * TEN, (1, 0, 1, 1)),
    ("two", ["2"] * 9 + ["3"], (1, 1, 1, 0)),
    ("a dog", ["dog"] * 3 + ["cat"] * 7, (0.9, 0.9, 0.9, 0)),
    ("dog", ["dog"] * 3 + ["cat"] * 7, (0.9, 0.9, 0.9, 1)),
    ("Dog", ["dog"] * 2 + ["cat"] * 8, (0.6, 0.6, 0.6, 2 / 3)),
    ("dog", ["dog"] + ["cat"] * 9, (0.3, 0.3, 0.3, 1 / 3)),
    ("fish", ["dog"] * 5 + ["cat"] * 5, (0, 0, 0, 0)),
    ("dog's", ["dog's"] * 2 + ["dog"] * 8, (0.6, 0.6, 0.6, 2 / 3)),
]


@pytest.mark.parametrize("text", NORMALIZED)
def test_normalized(text: str) -> None:
    assert normalized(text) == NORMALIZED[text]


@pytest.mark.parametrize("prediction, answers, expected", CASES)
def test_rules(prediction: str, answers: list[str], expected: tuple[float, ...]) -> None:
    found = [vqa_accuracy({"q": prediction}, {"q": answers}, rule).value for rule in RULES]
    assert found == pytest.approx(expected)


def test_one_answer_is_compared_as_it_is() -> None:
    assert vqa_accuracy({"q": "dog"}, {"q": ["dog"]}).value == 1


def test_unknown_rule() -> None:
    with pytest.raises(ValueError, match="official, script_2017, harness, simple"):
        vqa_accuracy({"q": "dog"}, {"q": ["dog"]}, "lenient")
