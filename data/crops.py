"""Draw the crop of an image at random, as big_vision pretrains its ViTs: Inception's crop, and left and right changed.

The crop is that of TensorFlow's `sample_distorted_bounding_box` as big_vision's `inception_crop` calls it
(`pp/ops_image.py`): 5 % to 100 % of the area, sides of 3 : 4 to 4 : 3.
"""

import math

import numpy as np
from PIL import Image

AREA = 0.05, 1.0  # least and most share of the image's area
ASPECT = 0.75, 1.33  # width by height
ATTEMPTS = 100  # then the whole image is taken

Crop = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def inception_crop(width: int, height: int, rng: np.random.Generator) -> Crop:
    """Draw a crop of an image of width x height pixels.

    Its height, and not its area, is uniform between the least and the most that the area and the image allow.
    """
    least, most = (share * width * height for share in AREA)
    for _ in range(ATTEMPTS):
        aspect = float(rng.uniform(*ASPECT))
        low, high = round(math.sqrt(least / aspect)), min(round(math.sqrt(most / aspect)), height)
        if round(high * aspect) > width:
            high = int((width + 0.5) / aspect)
            high -= round(high * aspect) > width
        h = int(rng.integers(low, max(low, high) + 1))
        w = round(h * aspect)
        if w * h < least:  # by rounding
            h += 1
            w = round(h * aspect)
        if 0 < w <= width and 0 < h <= height and w * h >= least:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return 0, 0, width, height


def augmented(image: Image.Image, rng: np.random.Generator, crop: bool, flip: bool) -> Image.Image:
    """Return the image with a crop drawn (`crop`), and in half of the draws turned left to right (`flip`)."""
    if crop:
        image = image.crop(inception_crop(*image.size, rng))
    if flip and rng.integers(2):
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image
