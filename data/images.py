"""Encoded images to square RGB arrays."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.objectives.base import Skip

FORMATS = ("JPEG", "PNG", "WEBP")


def decode(content: bytes, size: int) -> NDArray[np.uint8]:
    """uint8 [size, size, 3]; raises Skip (a defect) for what is not a whole JPEG, PNG or WebP image.

    A plain resize to the square, as PaliGemma's: the aspect ratio is not kept, nothing is cropped. Pillow's bilinear
    filter, whose support grows with the reduction (antialiased), on the values as stored (no gamma). Transparency is
    laid over white; the orientation that EXIF asks for is not applied, as boxes count in stored pixels.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.load()
            rgb = _rgb(image)
    except Exception as error:  # Decoders raise almost anything when fed corrupt bytes.
        raise Skip("unreadable image", defect=True) from error
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(rgb, np.uint8)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grayscale: Pillow's own conversion clips at 255.
        return Image.fromarray((np.asarray(image, np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), with_alpha).convert("RGB")
    return image.convert("RGB")
