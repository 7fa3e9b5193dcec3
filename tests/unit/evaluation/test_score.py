"""Points of one example for every objective: (earned, possible) by score, written out."""

import pytest

from evaluation.sample_sheet import Sample
from evaluation.score import SCORERS, Points, blind_predictions, interval

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


def test_an_interval_is_that_of_independent_records() -> None:
    """Against 0.5 +- 1.96 sqrt(0.25 / n): n records of one example each, then half as many of two equal ones."""
    points = [(float(number % 4 < 2), 1.0) for number in range(400)]
    for records, count in (([*range(400)], 400), ([number // 2 for number in range(400)], 200)):
        low, high = interval(points, records)
        half = 1.96 * (0.25 / count) ** 0.5
        assert (low, high) == (pytest.approx(0.5 - half, abs=0.008), pytest.approx(0.5 + half, abs=0.008))


def test_an_interval_of_boxes_is_of_their_ratio() -> None:
    assert interval([(2.0, 4.0), (0.0, 0.0)], ["a", "b"]) == (0.5, 0.5)  # resamples of "b" alone have no score
    assert interval([(0.0, 0.0)], ["a"]) == interval([], []) == (None, None)


def test_a_text_is_blind_with_the_next_target_of_its_language() -> None:
    def text(language: str, target: str, has_image: bool = False) -> Sample:
        return Sample("text", "span_corruption", "", language, "", [target], "", None, "own", has_image)

    samples = [text("en", "a"), text("de", "b"), text("en", "c"), text("en", "d", has_image=True)]
    assert blind_predictions(samples) == ["c", None, "d", "own"]
    assert blind_predictions([text("en", "a"), text("en", "b")]) == ["b", "a"]
