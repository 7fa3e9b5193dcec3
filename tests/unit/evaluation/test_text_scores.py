"""Scores against values worked out by hand."""

import pytest

from evaluation import text_scores as scores


def test_exact_match_forgives_case_unicode_form_and_spaces() -> None:
    assert scores.exact_match(" Cafe\u0301  red ", ["café red"]) == 1
    assert scores.exact_match("red", ["blue", "green"]) == 0


@pytest.mark.parametrize(
    ("matching", "of", "accuracy"), [(0, 10, 0), (1, 10, 1 / 3), (2, 10, 2 / 3), (3, 10, 1), (7, 10, 1), (1, 1, 1)]
)
def test_vqa_accuracy(matching: int, of: int, accuracy: float) -> None:
    assert scores.vqa_accuracy("red", ["red"] * matching + ["blue"] * (of - matching)) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "abc", 0), ("flaw", "lawn", 2)]
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert scores.edit_distance(a, b) == scores.edit_distance(b, a) == distance


def test_character_error_rate_is_at_most_one() -> None:
    assert scores.character_error_rate("ПРИВЕД", "привет") == pytest.approx(1 / 6)
    assert scores.character_error_rate("a very long answer", "no") == 1


def test_tokens_are_words_or_unspaced_characters() -> None:
    assert scores.tokens("A red circle, above!") == ["a", "red", "circle", "above"]
    assert scores.tokens("赤い円 x") == ["赤", "い", "円", "x"]


def test_token_f1() -> None:
    assert scores.token_f1("a red circle", ["a blue circle on a sign"]) == pytest.approx(2 * 2 / (3 + 6))
    assert scores.token_f1("赤い円", ["青い円"]) == pytest.approx(2 / 3)
    assert scores.token_f1("x", ["y", "x"]) == 1
    assert scores.token_f1("", ["y"]) == 0
    assert scores.token_f1("<extra_id_0> a <extra_id_1> b", ["<extra_id_0> c d <extra_id_1> e"]) == 0
    assert scores.token_f1("<extra_id_0> a <extra_id_1> b", ["<extra_id_0> b<extra_id_1>"]) == pytest.approx(2 / 3)


def test_set_f1() -> None:
    assert scores.set_f1(["red circle", "star"], ["Star", "square"]) == pytest.approx(0.5)
    assert scores.set_f1([], []) == 1
