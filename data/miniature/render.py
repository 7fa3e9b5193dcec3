"""Draw scenes as pixels."""

import io

import numpy as np
from PIL import Image, ImageDraw

from data.miniature.scene import Scene, Sign, outline
from data.miniature.text_image import word_extent, word_mask

OVERSAMPLING = 3
JPEG_QUALITY = 92
RGB = {
    "red": (220, 30, 35),
    "green": (20, 150, 50),
    "blue": (30, 70, 220),
    "yellow": (250, 225, 30),
    "purple": (140, 30, 165),
    "black": (15, 15, 15),
    "white": (252, 252, 252),
}
BOARD_RGB = {"white": (245, 245, 240), "yellow": (245, 235, 150), "blue": (180, 210, 245), "green": (190, 235, 190)}
INK_RGB = (20, 20, 30)


def render(scene: Scene, image_size: int) -> Image.Image:
    """Draw the scene as an RGB image of image_size x image_size pixels."""
    side = image_size * OVERSAMPLING
    top, bottom = (np.array(color, dtype=np.float64) for color in scene.background)
    share = np.linspace(0, 1, image_size)[:, None]
    rows = np.round(top + share * (bottom - top)).astype(np.uint8)
    column = Image.fromarray(rows[:, None, :])
    image = column.resize((side, side), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    for shape in scene.shapes:
        draw.polygon([(float(x), float(y)) for x, y in outline(shape) * side], fill=RGB[shape.color])
    if scene.sign:
        _draw_board(draw, scene.sign, side)
    image = image.reduce(OVERSAMPLING)
    if scene.sign:
        _paste_word(image, scene.sign)
    return image


def _draw_board(draw: ImageDraw.ImageDraw, sign: Sign, side: int) -> None:
    ymin, xmin, ymax, xmax = (value * side for value in sign.box)
    draw.rectangle((xmin, ymin, xmax - 1, ymax - 1), BOARD_RGB[sign.board], INK_RGB, width=round(side / 112))


def _paste_word(image: Image.Image, sign: Sign) -> None:
    """Paste the word; its mask is scaled straight to the final pixels, which keeps thin strokes dark."""
    height, width = (max(1, round(value * image.height)) for value in word_extent(sign.word))
    mask = word_mask(sign.word).resize((width, height), Image.Resampling.BOX)
    corner = round(sign.x * image.width - width / 2), round(sign.y * image.height - height / 2)
    image.paste(INK_RGB, (*corner, corner[0] + width, corner[1] + height), mask)


def encode(image: Image.Image) -> bytes:
    """Encode as JPEG without color subsampling: small shapes keep the colors that their questions ask for."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
