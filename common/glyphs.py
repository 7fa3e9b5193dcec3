"""Find the fonts that Matplotlib carries, and order text for drawing from left to right."""

from pathlib import Path

import arabic_reshaper  # type: ignore[import-untyped, unused-ignore]
import matplotlib
from bidi.algorithm import get_display  # type: ignore[import-untyped, unused-ignore]

DEJAVU = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
DEJAVU_BOLD = DEJAVU.with_name("DejaVuSans-Bold.ttf")


def visual_order(text: str, base_direction: str | None = None) -> str:
    """Return the glyphs from left to right: Arabic letters joined, right-to-left runs reversed.

    `base_direction`: "L" or "R"; None takes that of the first letter.
    """
    return str(get_display(arabic_reshaper.reshape(text), base_dir=base_direction))
