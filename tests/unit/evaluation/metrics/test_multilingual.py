"""XM3600's three tokenizations."""

from importlib.util import find_spec

import pytest

from common.errors import ConfigurationError
from evaluation.metrics import multilingual


def test_characters_keep_their_marks() -> None:
    assert multilingual.characters(["สี แดง!", "Ｄｏｇ."]) == [["สี", "แ", "ด", "ง"], ["d", "o", "g"]]


def test_vocabulary_cuts_into_the_longest_known_words() -> None:
    references = ["一 只 小 狗", "小狗 在 跑"]
    assert multilingual.vocabulary(references, ["一只小狗在草地跑。"]) == [["一", "只", "小狗", "在", "草", "地", "跑"]]


def test_words() -> None:
    assert multilingual.words("de", ["Ein Hund, der läuft."]) == [["ein", "hund", "der", "läuft"]]


def test_a_segmenter_cuts_what_has_no_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown with a function of the standard library: none of the three packages is needed to test."""
    monkeypatch.setitem(multilingual.SEGMENTERS, "th", ("builtins", "sorted"))
    assert multilingual.words("th", ["คกข", "กข ค", ""]) == [["ก", "ข", "ค"], ["กข", "ค"], []]


@pytest.mark.skipif(find_spec("jieba") is not None, reason="jieba is installed")
def test_a_missing_segmenter_is_a_sentence_and_leaves_the_other_scores() -> None:
    with pytest.raises(ConfigurationError, match="pip install jieba"):
        multilingual.words("zh", ["一只小狗"])
    references = {"1": ["一 只 狗"], "2": ["两 只 猫"]}
    scores = multilingual.xm3600_cider({"1": "一只狗", "2": "两只猫"}, references, "zh")
    assert set(scores) == {"cider_characters", "cider_vocabulary"}
    assert scores["cider_vocabulary"].value > 0
