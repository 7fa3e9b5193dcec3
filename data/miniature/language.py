"""Language tables: the words of every phrase, already inflected, so that code never has to know grammar."""

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
    """One language; `table` is its YAML file (the keys are explained in the README)."""

    code: str
    spaced: bool
    sentence_break: str
    table: dict[str, Any]

    def phrase(self, shape: Shape, with_size: bool = True) -> str:
        """A noun phrase with its indefinite article: “a large red circle”."""
        table = self.table
        word, gender, _ = table["shapes"][shape.kind]
        return str(table["phrase" if with_size else "phrase_plain"]).format(
            article=_form(table.get("article", ""), gender),
            size=_form(table["sizes"][shape.size], gender),
            colour=_form(table["colours"][shape.colour], gender),
            shape=word,
        )

    def objects(self, scene: Scene, with_size: bool = True) -> str:
        """All that is to be seen, from left to right, the sign last."""
        items = [self.phrase(shape, with_size) for shape in sorted(scene.shapes, key=lambda shape: shape.x)]
        if scene.sign:
            items.append(self.table["sign"].format(word=scene.sign.word))
        return self.join(items)

    def join(self, items: Sequence[str]) -> str:
        """An enumeration: “a, b and c”."""
        if len(items) == 1:
            return items[0]
        return str(self.table["comma"]).join(items[:-1]) + str(self.table["and"]) + items[-1]

    def definite(self, kind: str) -> str:
        """“the circle”, as the questions about a shape want it."""
        return str(self.table["shapes"][kind][2])

    def colour(self, colour: str, form: str) -> str:
        """The colour as attribute of “figure” (“the … object”) or of “figures” (“how many … objects”)."""
        return _form(self.table["colours"][colour], form)


@cache
def language(code: str) -> Language:
    """The language of a code, read once."""
    table = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(FOLDER / f"{code}.yaml")))
    spaced = bool(table.get("spaced", True))
    return Language(code, spaced, str(table.get("sentence_break", " " if spaced else "")), table)


@cache
def sign_words() -> tuple[tuple[str, str], ...]:
    """All words that signs carry, as (word, language); a word belongs to one language only."""
    return tuple((word, code) for code in CODES for word in language(code).table.get("words", ()))
