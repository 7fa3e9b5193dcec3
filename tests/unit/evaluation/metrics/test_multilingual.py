"""XM3600's three tokenizations."""

import tempfile
from pathlib import Path

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


@pytest.mark.parametrize(
    ("language", "text", "cut"),
    [
        ("zh", "一只小狗在草地上奔跑。", "一只 小狗 在 草地 上 奔跑"),
        ("ja", "芝生の上を走る小さな犬。", "芝生 の 上 を 走る 小さな 犬"),
        ("th", "สุนัขตัวเล็กวิ่งบนหญ้า", "สุนัข ตัวเล็ก วิ่ง บน หญ้า"),
    ],
)
def test_a_segmenter_cuts_what_has_no_spaces(language: str, text: str, cut: str) -> None:
    assert multilingual.words(language, [text, cut, ""]) == [cut.split(), cut.split(), []]
    references = {"1": [cut], "2": ["x y"]}
    scores = multilingual.xm3600_cider({"1": text, "2": "x y"}, references, language)
    assert scores["cider_words"].value > 5 and scores["cider_words"].by_id["1"] > 5


def test_a_cache_of_jieba_that_others_may_write_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    multilingual._segmenter.cache_clear()
    (tmp_path / "jieba.cache").write_bytes(b"no cache")
    assert multilingual.words("zh", ["小狗在跑"])[0][0] == "小狗"
    assert [path.name for path in tmp_path.iterdir()] == ["jieba.cache"]


def test_a_missing_segmenter_is_a_sentence_and_leaves_the_other_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(multilingual.SEGMENTERS, "zh", ("nowhere", "cut"))
    multilingual._segmenter.cache_clear()
    with pytest.raises(ConfigurationError, match=r"^cider_words is left out, because the package nowhere is not"):
        multilingual.words("zh", ["一只小狗"])
    references = {"1": ["一 只 狗"], "2": ["两 只 猫"]}
    scores = multilingual.xm3600_cider({"1": "一只狗", "2": "两只猫"}, references, "zh")
    assert set(scores) == {"cider_characters", "cider_vocabulary"}
    assert scores["cider_vocabulary"].value > 0
