"""Draw text in images, in every script that DejaVu (part of Matplotlib) or another font of the machine covers."""

import unicodedata
from bisect import bisect_right
from functools import cache

from PIL import ImageDraw, ImageFont

from common.glyphs import DEJAVU, font_path, visual_order

RTL = ("R", "AL")

Color = tuple[int, int, int]


class TextDrawer:
    """Draw text of one size in pixels, each run of letters in the first font that has them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.line_height = round(size * 1.35)

    def covers(self, text: str) -> bool:
        """Return whether every letter of the text has a font."""
        return all(font_path(letter) for letter in text if not letter.isspace())

    def wrapped(self, text: str, width: int) -> list[str]:
        """Break a text into lines of at most `width` pixels, at spaces or in too long a word.

        Letters without a font are written as escapes.
        """
        lines, line = [], ""
        for word in self._escaped(text).split(" "):
            candidate = f"{line} {word}" if line else word
            if self._length(candidate) <= width:
                line = candidate
                continue
            if line:
                lines.append(line)
            line = word
            while self._length(line) > width:
                cut = max(1, bisect_right(range(1, len(line)), float(width), key=lambda end: self._length(line[:end])))
                lines.append(line[:cut])
                line = line[cut:]
        return [*lines, line]

    def write(self, pen: ImageDraw.ImageDraw, position: tuple[int, int], line: str, color: Color) -> None:
        """Draw one line with its upper left corner at `position`; right-to-left scripts are joined and ordered."""
        x, y = float(position[0]), position[1]
        for font, run in self._runs(_visual(line)):
            pen.text((x, y), run, font=font, fill=color)
            x += font.getlength(run)

    def _escaped(self, text: str) -> str:
        clean = " ".join(text.split())
        return "".join(c if c == " " or font_path(c) else c.encode("unicode_escape").decode() for c in clean)

    def _length(self, line: str) -> float:
        return sum(font.getlength(run) for font, run in self._runs(_visual(line)))

    def _runs(self, line: str) -> list[tuple[ImageFont.FreeTypeFont, str]]:
        runs: list[tuple[str, str]] = []
        for letter in line:
            path = font_path(letter) or str(DEJAVU)
            if runs and (runs[-1][0] == path or letter == " "):
                runs[-1] = (runs[-1][0], runs[-1][1] + letter)
            else:
                runs.append((path, letter))
        return [(_font(path, self.size), run) for path, run in runs]


def _visual(line: str) -> str:
    """Return the line in its order from left to right; a line without right-to-left letters stays as it is."""
    if not any(unicodedata.bidirectional(letter) in RTL for letter in line):
        return line
    return visual_order(line, "L")


@cache
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
