"""Find fonts for the letters of a text, and order text for drawing from left to right."""

from functools import cache
from pathlib import Path

import arabic_reshaper  # type: ignore[import-untyped, unused-ignore]
import matplotlib
from bidi.algorithm import get_display  # type: ignore[import-untyped, unused-ignore]
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

DEJAVU = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
DEJAVU_BOLD = DEJAVU.with_name("DejaVuSans-Bold.ttf")
PLACEHOLDER_FONT = "LastResort"  # has a box for every character, and no letters


def visual_order(text: str, base_direction: str | None = None) -> str:
    """Return the glyphs from left to right: Arabic letters joined, right-to-left runs reversed.

    `base_direction`: "L" or "R"; None takes that of the first letter.
    """
    return str(get_display(arabic_reshaper.reshape(text), base_dir=base_direction))


def families(text: str) -> list[str]:
    """Return the font families that Matplotlib needs for a text: DejaVu Sans, and others for letters that it lacks."""
    paths = {font_path(letter) for letter in set(text) if not letter.isspace()}
    names = {entry.name for entry in font_manager.fontManager.ttflist if entry.fname in paths}
    return ["DejaVu Sans", *sorted(names - {"DejaVu Sans"})]


@cache
def font_path(letter: str) -> str | None:
    """Return the first font with this letter: DejaVu, else any other of the machine."""
    if ord(letter) in _letters(str(DEJAVU)):
        return str(DEJAVU)
    others = (entry.fname for entry in font_manager.fontManager.ttflist if PLACEHOLDER_FONT not in entry.fname)
    return next((path for path in others if ord(letter) in _letters(path)), None)


@cache
def _letters(path: str) -> frozenset[int]:
    return frozenset(FT2Font(path).get_charmap())
