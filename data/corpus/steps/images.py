"""Judge images: size of the file, format, shape, and whether all pixels can be decoded."""

import io
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from data.corpus.config import ImageConfig
from data.images import FORMATS
from data.skip import Skip

SEEN = 512  # pixels of the longer side of the copy that later steps see; libjpeg decodes the next power of two above


class Seen(NamedTuple):
    """Hold an image's width and height in pixels, upright, and a copy of at most SEEN pixels a side."""

    width: int
    height: int
    pixels: NDArray[np.uint8]


def look(content: bytes, config: ImageConfig, curated: bool = False) -> Seen:
    """Return the image; raise Skip for one that is broken, too small, too large or too long.

    A curated image is only refused where training could not decode it either.
    """
    if len(content) > config.max_mib << 20:
        raise Skip(f"image of more than {config.max_mib} MiB")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_shape(image.width, image.height, config, curated)
            size = image.size
            if image.format == "JPEG" and image.mode in ("L", "RGB"):
                image.draft(None, (SEEN, SEEN))  # every byte is still decoded, so that a cut is found
            image.load()
            rgb, turned = _upright(image)
    except Skip:
        raise
    except Exception as error:  # decoders raise almost anything for corrupt bytes
        raise Skip("unreadable image", defect=True, detail=type(error).__name__) from error
    rgb.thumbnail((SEEN, SEEN), Image.Resampling.BILINEAR)
    width, height = size[::-1] if turned else size
    return Seen(width, height, np.asarray(rgb, np.uint8))


def whole(content: bytes) -> NDArray[np.uint8]:
    """Return all pixels of an image that `look` accepted."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        image.load()
        return np.asarray(_upright(image)[0], np.uint8)


def _upright(image: Image.Image) -> tuple[Image.Image, bool]:
    """Return an image in RGB, turned as its EXIF tag asks, and whether its sides changed places."""
    upright = image
    with suppress(Exception):  # a broken tag does not make the pixels unreadable
        upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return upright.convert("RGB"), upright.size != image.size


def _check_shape(width: int, height: int, config: ImageConfig, curated: bool) -> None:
    if width * height > config.max_megapixels * 1e6:
        raise Skip("image of too many pixels")
    if not curated and min(width, height) < config.min_side:
        raise Skip("image too small")
    if not curated and max(width, height) > config.max_aspect * min(width, height):
        raise Skip("image too long")
