"""Each step alone: images, texts, rules, languages, labels, questions, translations, similarity."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lingua import Language, LanguageDetectorBuilder
from PIL import Image

from common.errors import ConfigurationError
from data.corpus.config import ImageConfig, SimilarityConfig, TextConfig
from data.corpus.steps import images, labels, language, questions, rules, similarity, text
from data.corpus.steps.language import identify
from data.corpus.steps.translations import Translations, make_table
from data.skip import Skip
from tests.unit.data.corpus.conftest import jpeg, photo


def cause(call: Any, *arguments: Any) -> str:
    with pytest.raises(Skip) as raised:
        call(*arguments)
    return raised.value.cause


def test_images_are_judged_by_size_shape_and_all_their_bytes() -> None:
    config = ImageConfig(max_megapixels=0.5)
    seen = images.look(jpeg(photo(1, 640, 480)), config)
    assert (seen.width, seen.height) == (640, 480) and max(seen.pixels.shape) <= images.SEEN
    content = jpeg(photo(1, 640, 480))
    for broken in (content[: len(content) - 200], b"", b"GIF89a", content[:100]):
        assert cause(images.look, broken, config) == "unreadable image"
    assert cause(images.look, jpeg(photo(1, 63, 100)), config) == "image too small"
    assert cause(images.look, jpeg(photo(1, 400, 100)), config) == "image too long"
    assert images.look(jpeg(photo(1, 400, 50)), config, curated=True).width == 400
    assert cause(images.look, jpeg(photo(1, 800, 800)), config) == "image of too many pixels"
    assert cause(images.look, bytes(2 << 20), ImageConfig(max_mib=1)) == "image of more than 1 MiB"


def test_an_image_at_a_limit_is_kept_and_one_beyond_it_is_not() -> None:
    config = ImageConfig(min_side=64, max_aspect=3.0, max_megapixels=0.03)
    for kept, beyond, expected in (
        ((64, 100), (63, 100), "image too small"), ((192, 64), (193, 64), "image too long"),
        ((200, 150), (200, 151), "image of too many pixels"),
    ):  # fmt: skip
        assert images.look(jpeg(photo(1, *kept)), config).width == kept[0]
        assert cause(images.look, jpeg(photo(1, *beyond)), config) == expected
    small = ImageConfig(max_mib=1)
    assert cause(images.look, bytes(1 << 20), small) == "unreadable image"
    assert cause(images.look, bytes((1 << 20) + 1), small) == "image of more than 1 MiB"


def test_an_image_is_turned_upright() -> None:
    content, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    photo(2, 200, 100).save(content, "JPEG", exif=exif)
    seen = images.look(content.getvalue(), ImageConfig())
    assert (seen.width, seen.height) == (100, 200) and seen.pixels.shape == (200, 100, 3)


def test_texts_without_content_are_refused() -> None:
    config = TextConfig(min_words=2, max_characters=100, max_texts=3, boilerplate=[r"foto von .*"])
    assert text.check_alt_text(["  a  red\nball ", "a red ball", ""], config) == ["a red ball"]
    assert text.check_alt_text(["红色的球"], config) == ["红色的球"]
    for given, expected in (
        ([""], "empty text"), (["\u200b \u00a0"], "empty text"), (["IMG_1234.jpg"], "boiler-plate text"),
        (["DSC 0012"], "boiler-plate text"),
        (["https://x.org/a"], "boiler-plate text"), (["- 12 -"], "boiler-plate text"),
        (["Foto von Haus"], "boiler-plate text"), (["ball"], "text too short"), (["a " * 80], "text too long"),
        ([f"the text {n}" for n in range(4)], "too many texts of an image"),
    ):  # fmt: skip
        assert cause(text.check_alt_text, given, config) == expected, given
    assert text.cut_document(["x" * 10], TextConfig(max_document_characters=4)) == (["xxxx"], True)


def test_texts_at_a_limit_are_kept_and_those_beyond_it_are_not() -> None:
    config = TextConfig(min_words=2, max_characters=8, max_texts=2, max_document_characters=4)
    assert text.check_alt_text(["red ball", "a ball"], config) == ["red ball", "a ball"]
    for beyond, expected in (
        (["a ball", "a cat", "a dog"], "too many texts of an image"), (["red balls"], "text too long"),
        (["ball"], "text too short"),
    ):  # fmt: skip
        assert cause(text.check_alt_text, beyond, config) == expected
    assert text.cut_document(["", "abcd"], config) == (["abcd"], False)
    assert text.cut_document(["abcd", "abcde"], config) == (["abcd", "abcd"], True)
    assert cause(text.cut_document, ["", ""], config) == "empty text"


def test_rules_find_personal_data_and_nothing_else() -> None:
    for found in (
        "write to jane.doe@mail.example.org", "call +49 30 1234 5678", "call (415) 555-2671",
        "card 4111 1111 1111 1111",
        "IBAN DE89 3704 0044 0532 0130 00",
    ):  # fmt: skip
        assert rules.pii({"alt_text": found}, None) == "personal data", found
    for clean in (
        "a photo of 2019-05-12 10:30",
        "ISBN 978-3-16-148410-0",
        "1920x1080 wallpaper",
        "4111 1111 1111 1112",
        "a@b",
    ):
        assert rules.pii({"alt_text": [clean]}, None) is None, clean
    assert rules.adult_words({"alt_text": "XXX movie"}, None) and not rules.adult_words({"alt_text": "Essex"}, None)
    assert cause(rules.check, ["adult_words"], {"alt_text": "nsfw art"}, None) == "adult words"
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        rules.rules(("os:nothing",))


@pytest.mark.parametrize(
    ("code", "words"),
    [("en", "a dog runs in the park"), ("de", "der Hund läuft durch den Park"), ("ru", "собака бежит по парку"),
     ("iw", "הכלב רץ בפארק"), ("zh", "一只狗在公园里跑"), ("sw", "mbwa anakimbia kwenye bustani nzuri sana")],
)  # fmt: skip
def test_languages_are_identified(code: str, words: str) -> None:
    assert identify(words, ["fasttext"])[0] == code


def test_lingua_votes_on_short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [Language.GERMAN, Language.DUTCH, Language.ENGLISH]  # the models of all languages take 10 s to load
    detector = LanguageDetectorBuilder.from_languages(*few).with_preloaded_language_models().build()
    monkeypatch.setattr(language, "_lingua_detector", lambda: detector)
    found, confidence = identify("ich möchte Brot", ["fasttext", "lingua"])
    assert found == "de" and 0.3 < confidence <= 1
    assert identify("", ["fasttext", "lingua"])[1] < 0.5


def test_questions_come_from_the_captions_words() -> None:
    made = dict(questions.by_rules("A brown dog on the sofa, and two cats near a red ball."))
    assert made == {
        "What color is the dog?": "brown", "What color is the ball?": "red", "How many cats are there?": "two",
        "Where is the brown dog?": "on the sofa",
    }  # fmt: skip
    assert questions.by_rules("Sunset.") == [] and questions.by_rules("The best of the best in the world") == []
    record: dict[str, Any] = {"language": "en", "alt_text": "two cats in a box"}
    assert questions.add(record, questions.by_rules) == 2
    assert record["questions"][0] == {"language": "en", "question": "How many cats are there?", "answer": ["two"]}
    assert questions.add({"language": "de", "alt_text": "two cats"}, questions.by_rules) == 0


def test_translations_are_added_and_answers_stay_english(tmp_path: Path) -> None:
    (tmp_path / "de.tsv").write_text("a dog\tein Hund\nIs it a dog?\tIst es ein Hund?\n", encoding="utf-8")
    make_table({"de": str(tmp_path / "de.tsv")}, tmp_path / "table")
    record: dict[str, Any] = {"captions": {"en": ["a dog", "a cat"]}}
    record["questions"] = [{"language": "en", "question": "Is it a dog?", "answer": ["yes"]}]
    assert Translations(tmp_path / "table").add(record) == 2
    assert record["captions"] == {"en": ["a dog", "a cat"], "de": ["ein Hund"]}
    assert record["questions"][1] == {"language": "de", "question": "Ist es ein Hund?", "answer": ["yes"]}
    (tmp_path / "de.tsv").write_text("no tab", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="no tab in line 1"):
        make_table({"de": str(tmp_path / "de.tsv")}, tmp_path / "other")


def test_negatives_are_absent_and_depend_on_the_id_alone() -> None:
    every = [f"label {n}" for n in range(20)]
    first, again = ({"objects": [{"label": "label 3"}]} for _ in range(2))
    assert labels.add_negatives(first, "a", every, 18) == 18
    labels.add_negatives(again, "a", every, 18)
    assert first == again and "label 3" not in first["absent_labels"] and len(set(first["absent_labels"])) == 18
    verified = {"objects": [{"label": "x"}], "absent_labels": ["y"]}
    assert labels.add_negatives(verified, "b", every, 5) == 0


def test_the_share_that_is_kept_is_the_top_of_all_parts() -> None:
    counts = {"en": {10: 5, 20: 3, 30: 2}, "de": {5: 10}}
    assert similarity.thresholds(counts, SimilarityConfig(keep=0.1)) == {"all": 30}
    assert similarity.thresholds(counts, SimilarityConfig(keep=0.2)) == {"all": 20}
    by_language = similarity.thresholds(counts, SimilarityConfig(keep=0.5, by_language=True))
    assert by_language == {"en": 20, "de": 5}
    assert similarity.is_kept(5, "de", by_language) and not similarity.is_kept(19, "en", by_language)


def test_clip_scores_as_the_model_itself(tmp_path: Path) -> None:
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefgh", *(f"{c}</w>" for c in "abcdefgh")]
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": len(words), "max_position_embeddings": 8, "eos_token_id": 1},
        vision_config={**small, "image_size": 32, "patch_size": 16}, projection_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(config)
    model.save_pretrained(tmp_path)
    tokenizer = CLIPTokenizerFast(vocab={word: n for n, word in enumerate(words)}, merges=[], model_max_length=8)
    processor = CLIPProcessor(CLIPImageProcessor(size=32, crop_size=32), tokenizer)
    processor.save_pretrained(tmp_path)
    score = similarity.scorer("clip", str(tmp_path))
    assert score is not None
    pixels = [np.asarray(photo(n)) for n in range(3)]
    made = score(pixels, ["a b", "c", "h g f"])
    given = processor(text=["a b", "c", "h g f"], images=pixels, return_tensors="pt", padding="max_length")
    expected = model.eval()(**given).logits_per_image.diagonal() / model.logit_scale.exp()
    assert np.allclose(made, expected.detach().numpy(), atol=1e-5) and len(set(made.tolist())) == 3
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        similarity.Clip(str(tmp_path / "nothing"))
