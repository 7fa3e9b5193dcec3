"""Plug steps into a corpus of tests: a scorer, and an OCR engine that hangs or dies on some images."""

import os
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data.corpus.steps.ocr import Text

HANGS, CRASHES = (255, 1, 1), (1, 255, 1)  # colors of the first pixel


class Engine:
    """An OCR engine that reads a word and its place of the first pixel."""

    def __call__(self, pixels: NDArray[np.uint8]) -> list[Text]:
        order = tuple(pixels[0, 0].tolist())
        if order == HANGS:
            time.sleep(60)
        if order == CRASHES:
            os.abort()
        return [(f"EXIT {pixels[0, 0, 0]}", (1, 2, 50, 80), 0.9)]


class Scorer:
    """A scorer that finds long texts similar to all images, and more so to bright ones."""

    def __call__(self, images: Sequence[NDArray[np.uint8]], texts: Sequence[str]) -> NDArray[np.float64]:
        return np.array([one.mean() / 100_000 + len(text) / 100 for one, text in zip(images, texts, strict=True)])
