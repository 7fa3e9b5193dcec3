"""Encoded images to square RGB arrays."""

import io
import warnings
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from data.objectives.base import Skip

FORMATS = ("JPEG", "PNG", "WEBP")
MEGAPIXELS = 64.0
TAGGED = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})  # where an orientation may stand

# Of broken tags and chunks of a picture whose pixels are whole; each has a text of its own, so that they would repeat.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
Image.MAX_IMAGE_PIXELS = None  # Pillow's own bound lets 179 megapixels through, and warns from 89: `decode` has one.


def decode(
    content: bytes, size: int, max_megapixels: float = MEGAPIXELS, exif_orientation: bool = True
) -> NDArray[np.uint8]:
    """uint8 [size, size, 3]; raises Skip (a defect) for what is not a whole JPEG, PNG or WebP image, or is too large.

    A plain resize to the square, as PaliGemma's: the aspect ratio is not kept, nothing is cropped. Pillow's bilinear
    filter, whose support grows with the reduction (antialiased), on the values as stored (no gamma). Transparency is
    laid over white. With `exif_orientation` a photograph is turned upright, as every viewer shows it; without, it stays
    as its pixels are stored. The size is judged by the header, before any pixel takes memory.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > max_megapixels * 1e6:
                raise Skip("oversized image", defect=True, detail=f"it has {image.width} x {image.height} pixels")
            image.load()
            if exif_orientation and not TAGGED.isdisjoint(image.info):
                with suppress(Exception):  # The picture is whole, whatever the tags beside it hold.
                    ImageOps.exif_transpose(image, in_place=True)
            rgb = _rgb(image)
    except Skip:
        raise
    except Exception as error:  # Decoders raise almost anything when fed corrupt bytes.
        no_image = isinstance(error, UnidentifiedImageError)
        detail = "it is no JPEG, PNG or WebP image" if no_image else f"{type(error).__name__}: {error}"[:200]
        raise Skip("unreadable image", defect=True, detail=detail) from error
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
