"""Inception's crops as big_vision draws them, in training alone."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data import images
from data.config import DataConfig
from data.crops import AREA, ASPECT, augmented, inception_crop
from data.packing import Rows
from data.stream import Stream
from data.tokenizer import Tokenizer
from tests.unit.data.conftest import IMAGE_SIZE, TOKENS_PER_IMAGE, mixture


@pytest.mark.parametrize(("width", "height"), [(224, 224), (640, 300), (37, 90)])
def test_crops_keep_the_area_and_the_aspect_and_reach_every_corner(width: int, height: int) -> None:
    rng = np.random.default_rng(0)
    crops = np.array([inception_crop(width, height, rng) for _ in range(3000)])
    w, h = crops[:, 2] - crops[:, 0], crops[:, 3] - crops[:, 1]
    assert crops[:, :2].min() == 0 and crops[:, 2].max() == width and crops[:, 3].max() == height
    assert (w * h >= AREA[0] * width * height).all() and (w * h <= AREA[1] * width * height).all()
    assert (w >= h * ASPECT[0] - 1).all() and (w <= h * ASPECT[1] + 1).all()


def test_the_height_is_uniform_and_not_the_area() -> None:
    """The mean height of a square's crops, from TensorFlow's rule: between sqrt(0.05 / a) and min(1, 1 / a, ...)."""
    rng = np.random.default_rng(1)
    heights = [bottom - top for _, top, _, bottom in (inception_crop(1000, 1000, rng) for _ in range(4000))]
    aspects = np.linspace(*ASPECT, 10_001)
    expected = 500 * np.mean(np.sqrt(0.05 / aspects) + np.minimum(np.minimum(1 / aspects, np.sqrt(1 / aspects)), 1))
    assert np.mean(heights) == pytest.approx(expected, rel=0.01)


def test_an_image_that_has_no_such_part_is_taken_whole() -> None:
    assert inception_crop(1000, 1, np.random.default_rng(0)) == (0, 0, 1000, 1)


def test_half_of_the_images_are_turned_and_pixels_are_of_the_crop() -> None:
    left_to_right = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (200, 200, 3))
    buffer = io.BytesIO()
    Image.fromarray(left_to_right).save(buffer, "PNG")
    turned, spans = 0, set()
    for seed in range(100):
        rng = np.random.default_rng(seed)
        pixels = images.decode(
            buffer.getvalue(), 32, augment=lambda image, rng=rng: augmented(image, rng, crop=True, flip=True)
        )
        rising = np.diff(pixels[0, :, 0].astype(int))
        assert (rising >= 0).all() or (rising <= 0).all()
        turned += bool(pixels[0, 0, 0] > pixels[0, -1, 0])
        spans.add(abs(int(pixels[0, 0, 0]) - int(pixels[0, -1, 0])))
    assert 30 < turned < 70 and len(spans) > 30


def test_training_alone_crops_and_each_example_has_a_crop_of_its_own(data: DataConfig, tokenizer: Tokenizer) -> None:
    def rows(split: str, step: int, crop: bool) -> Rows:
        used = replace(data, inception_crop=crop, flip=crop)
        stream = Stream(used, mixture(("objects", "object_vqa", 1)), tokenizer, IMAGE_SIZE, TOKENS_PER_IMAGE, split, 7)
        return stream.rows(step, range(4))[0]

    plain, cropped, again = (rows("train", 1, crop) for crop in (False, True, True))
    for name in Rows.__annotations__:
        assert np.array_equal(cropped[name], again[name])
        assert np.array_equal(cropped[name], plain[name]) == (name != "images")
    assert np.array_equal(rows("validation", 1, True)["images"], rows("validation", 1, False)["images"])
    of_epochs = {rows("train", step, True)["images"].tobytes() for step in (1, 2, 3)}  # 24 records, 24 examples a step
    assert len(of_epochs) == 3
