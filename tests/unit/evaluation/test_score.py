"""Points of one example for every objective: (earned, possible) by score, written out."""

import pytest

from evaluation.score import SCORERS, Points

SOME = "12 20 300 400 red star"
OTHER = "12 20 300 400 blue star"


@pytest.mark.parametrize(
    ("objective", "prediction", "references", "points"),
    [
        ("vqa", "red", ["red", "blue", "red"], {"exact_match": (1, 1), "vqa_accuracy": (2 / 3, 1)}),
        ("vqa", "green", ["red"], {"exact_match": (0, 1), "vqa_accuracy": (0, 1)}),
        ("vqg", "what color", ["what color is it"], {"token_f1": (2 / 3, 1)}),
        ("captioning", "a dog", ["a cat", "a dog"], {"token_f1": (1, 1)}),
        ("split_captioning", "b", ["a"], {"token_f1": (0, 1)}),
        ("span_corruption", "a b", ["a c"], {"token_f1": (0.5, 1)}),
        ("ocr", "stop", ["shop"], {"character_error_rate": (1, 4), "exact_match": (0, 1)}),
        ("ocr", "an endless text", ["shop"], {"character_error_rate": (4, 4), "exact_match": (0, 1)}),
        ("object_vqa", "star", ["star"], {"exact_match": (1, 1), "label_f1": (1, 1)}),
        ("detection", SOME, [SOME], {"box_f1": (2, 2)}),
        ("detection", f"{SOME} {SOME}", [SOME], {"box_f1": (2, 3)}),
        ("detection", OTHER, [SOME], {"box_f1": (0, 2)}),
        ("detection", "", [SOME], {"box_f1": (0, 1)}),
    ],
)
def test_points_of_one_example(
    objective: str, prediction: str, references: list[str], points: dict[str, Points]
) -> None:
    found = SCORERS[objective](prediction, references)
    assert found.keys() == points.keys()
    for name, expected in points.items():
        assert found[name] == pytest.approx(expected), name
