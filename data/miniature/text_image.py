"""Draw the words of signs, in the DejaVu fonts that Matplotlib carries."""

from functools import cache

from PIL import Image, ImageDraw, ImageFont

from common.glyphs import DEJAVU_BOLD, visual_order

CAP_HEIGHT = 12 / 112  # capital letters, as fraction of the image
ARABIC_SCALE = 1.35  # Arabic has no capitals; larger type keeps its letters as legible
PADDING = 5 / 112  # between word and edge of the board
_DRAWN = 64  # font size in pixels at which a word is drawn before it is scaled; DejaVu's capitals are 0.729 of it
_CAP = 0.729 * _DRAWN


@cache
def word_mask(word: str) -> Image.Image:
    """Draw the word as a mask (mode L), cut to its ink, at a font size of 64 pixels."""
    # Without Pillow's optional raqm the bytes are the same on every machine.
    font = ImageFont.truetype(str(DEJAVU_BOLD), _DRAWN, layout_engine=ImageFont.Layout.BASIC)
    text = visual_order(word)
    left, top, right, bottom = (round(value) for value in font.getbbox(text))
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), text, fill=255, font=font)
    return mask


@cache
def word_extent(word: str) -> tuple[float, float]:
    """Return height and width of the ink, in fractions of the image."""
    mask = word_mask(word)
    scale = CAP_HEIGHT / _CAP * (ARABIC_SCALE if visual_order(word) != word else 1)
    return mask.height * scale, mask.width * scale


@cache
def sign_extent(word: str) -> tuple[float, float]:
    """Return height and width of the board that carries the word, in fractions of the image."""
    height, width = word_extent(word)
    return height + 2 * PADDING, width + 2 * PADDING
