"""CIDEr-D and BLEU on captions whose scores follow by hand."""

import math

import pytest

from evaluation.metrics import captions


def test_equal_captions_without_shared_words_get_the_highest_scores() -> None:
    references = {"1": ["one dog runs far away"], "2": ["two cats sleep very well"]}
    predictions = {id_: own[0] for id_, own in references.items()}
    assert captions.cider(predictions, references).value == pytest.approx(10)
    assert captions.bleu(predictions, references)["bleu_4"].value == pytest.approx(1)


def test_cider_of_one_item_is_zero() -> None:
    assert captions.cider({"1": "a dog"}, {"1": ["a dog"]}).value == 0


def test_a_short_caption_pays_for_its_length() -> None:
    score = captions.bleu({"1": "a dog", "2": ""}, {"1": ["a dog runs"], "2": ["a cat"]})["bleu_1"]
    assert score.value == pytest.approx(math.exp(1 - 5 / 2))
    assert score.counts.without_prediction == 0 and score.by_id["2"] < 1e-6
