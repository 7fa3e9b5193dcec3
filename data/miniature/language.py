"""Read language tables: the words of every phrase, already inflected, so that the code needs no grammar."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from data.miniature.scene import Scene, Shape

FOLDER = Path(__file__).parent / "languages"
CODES = ("en", "de", "fr", "es", "tr", "sw", "ru", "uk", "el", "ar", "zh", "ja", "th", "hi", "ko", "iw")

Forms = str | dict[str, str]  # one form for all, or one form per gender (and "figure", "figures": see README)


def _form(forms: Forms, gender: str) -> str:
    return forms if isinstance(forms, str) else forms[gender]


@dataclass(frozen=True)
class Language:
    """Hold one language; `table` is its YAML file (the keys are explained in the README)."""

    code: str
    spaced: bool
    sentence_break: str
    table: dict[str, Any]

    def phrase(self, shape: Shape, with_size: bool = True) -> str:
        """Return a noun phrase with its indefinite article: “a large red circle”."""
        table = self.table
        word, gender, _ = table["shapes"][shape.kind]
        return str(table["phrase" if with_size else "phrase_plain"]).format(
            article=_form(table.get("article", ""), gender),
            size=_form(table["sizes"][shape.size], gender),
            color=_form(table["colors"][shape.color], gender),
            shape=word,
        )

    def objects(self, scene: Scene, with_size: bool = True) -> str:
        """List all things in the scene, from left to right, the sign last."""
        items = [self.phrase(shape, with_size) for shape in sorted(scene.shapes, key=lambda shape: shape.x)]
        if scene.sign:
            items.append(self.table["sign"].format(word=scene.sign.word))
        return self.join(items)

    def join(self, items: Sequence[str]) -> str:
        """Join items to an enumeration: “a, b and c”."""
        if len(items) == 1:
            return items[0]
        return str(self.table["comma"]).join(items[:-1]) + str(self.table["and"]) + items[-1]

    def definite(self, kind: str) -> str:
        """Return “the circle” in the form that questions about a shape need."""
        return str(self.table["shapes"][kind][2])

    def color(self, color: str, form: str) -> str:
        """Return the color as attribute of “figure” (“the … object”) or of “figures” (“how many … objects”)."""
        return _form(self.table["colors"][color], form)


@cache
def language(code: str) -> Language:
    """Return the language of a code, read once."""
    table = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(FOLDER / f"{code}.yaml")))
    spaced = bool(table.get("spaced", True))
    return Language(code, spaced, str(table.get("sentence_break", " " if spaced else "")), table)


@cache
def sign_words() -> tuple[tuple[str, str], ...]:
    """Return all words of signs, as (word, language); a word belongs to one language only."""
    return tuple((word, code) for code in CODES for word in language(code).table.get("words", ()))
