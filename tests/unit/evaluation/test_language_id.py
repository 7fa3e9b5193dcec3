"""Which language a caption came out in."""

import pytest

from evaluation.language_id import LanguageIdentifier

REFERENCES = {
    "en": ["a big red circle and a small blue square", "a sign with the word hello", "a small green star"],
    "de": [
        "ein großer roter Kreis und ein kleines blaues Quadrat",
        "ein Schild mit dem Wort Haus",
        "ein kleiner grüner Stern",
    ],
    "fr": ["un grand cercle rouge et un petit carré bleu", "un panneau avec le mot maison", "une petite étoile verte"],
    "ru": ["большой красный круг и маленький синий квадрат", "маленькая зелёная звезда"],
    "uk": ["великий червоний круг і маленький синій квадрат", "маленька зелена зірка"],
    "ja": ["大きな赤い円と小さな青い四角", "小さな緑の星"],
}
IDENTIFY = LanguageIdentifier((language, text) for language, texts in REFERENCES.items() for text in texts)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("a red star and a small circle", "en"),
        ("ein roter Stern und ein kleiner Kreis", "de"),
        ("une étoile rouge et un petit cercle", "fr"),
        ("красная звезда", "ru"),
        ("червона зірка", "uk"),
        ("赤い星", "ja"),
    ],
)
def test_captions_of_other_scenes_are_distinguished(text: str, language: str) -> None:
    assert IDENTIFY(text) == language


def test_nothing_known_is_no_language() -> None:
    assert IDENTIFY("") is None
    assert IDENTIFY("ฉัน") is None
