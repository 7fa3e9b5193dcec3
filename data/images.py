"""Decode images to square RGB arrays."""

import io
import warnings
from collections.abc import Callable
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from data.skip import Skip

FORMATS = ("JPEG", "PNG", "WEBP")
MEGAPIXELS = 64.0
TAGGED = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})  # keys of an orientation

# Pillow warns of broken tags beside whole pixels, each time in other words, so Python would print every one.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is 179 megapixels, with a warning from 89; `decode` has a limit


def decode(
    content: bytes,
    size: int,
    max_megapixels: float = MEGAPIXELS,
    exif_orientation: bool = True,
    scaled: bool = False,
    augment: Callable[[Image.Image], Image.Image] | None = None,
) -> NDArray[np.uint8]:
    """Decode an image to uint8 [size, size, 3].

    Raises Skip, a defect, if the bytes are no whole JPEG, PNG or WebP image, or if the header gives more than
    `max_megapixels`; the header is read before any pixel takes memory. The image is resized to the square as in
    PaliGemma: the aspect ratio is not kept, nothing is cropped. The filter is Pillow's bilinear one, whose support
    grows with the reduction (antialiased), on the values as stored (no gamma). Transparent pixels become white. With
    `exif_orientation` a photograph is turned upright, as every viewer shows it.

    `scaled`: a JPEG of twice the size or more is decoded at 1/2, 1/4 or 1/8 (libjpeg's scaled inverse DCT), the
    smallest that is not below `size`; its pixels differ from those of the whole image. `augment` returns the part of
    the upright RGB image that is resized; then `scaled` has no effect, as a part needs all pixels.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > max_megapixels * 1e6:
                raise Skip("oversized image", defect=True, detail=f"it has {image.width} x {image.height} pixels")
            if scaled and augment is None and image.format == "JPEG":
                image.draft(None, (size, size))  # type: ignore[arg-type]
            image.load()
            if exif_orientation and not TAGGED.isdisjoint(image.info):
                with suppress(Exception):  # a broken tag does not make the pixels unreadable
                    ImageOps.exif_transpose(image, in_place=True)
            rgb = _rgb(image)
            if augment is not None:
                rgb = augment(rgb)
    except Skip:
        raise
    except Exception as error:  # decoders raise almost anything for corrupt bytes
        no_image = isinstance(error, UnidentifiedImageError)
        detail = "it is no JPEG, PNG or WebP image" if no_image else f"{type(error).__name__}: {error}"[:200]
        raise Skip("unreadable image", defect=True, detail=detail) from error
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(rgb, np.uint8)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grayscale: Pillow's own conversion clips at 255
        return Image.fromarray((np.asarray(image, np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), with_alpha).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # `convert` would copy every pixel once more
