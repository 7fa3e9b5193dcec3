"""OCR: texts with boxes and languages; an engine that hangs, crashes or raises costs one image, and is counted."""

import os
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from common.errors import ConfigurationError
from common.glyphs import DEJAVU
from data.corpus.config import OcrConfig
from data.corpus.steps.ocr import TESSDATA, BoundedEngine, Text, read_texts, script
from data.skip import Skip

EVIL = f"{__name__}:evil"


def evil() -> Callable[[np.ndarray], list[Text]]:
    """An engine that does as the first pixel asks."""

    def run(pixels: np.ndarray) -> list[Text]:
        order = int(pixels[0, 0, 0])
        if order == 1:
            time.sleep(60)
        if order == 2:
            os.abort()
        if order == 3:
            raise ValueError("no text")
        return [("EXIT", (1, 2, 5, 8), 0.9), ("weak", (0, 0, 1, 1), 0.1), ("ВЫХОД", (6, 2, 9, 20), 0.8)]

    return run


def test_an_engine_that_hangs_or_dies_is_started_again() -> None:
    with BoundedEngine(OcrConfig(engine=EVIL, timeout_s=0.5)) as run:
        causes = []
        for order in (0, 1, 0, 2, 3, 0):
            try:
                causes.append(len(run(np.full((10, 20, 3), order, np.uint8))))
            except Skip as skip:
                causes.append(skip.cause)
        assert causes == [3, "OCR engine hung", 3, "OCR engine crashed", "OCR engine raised ValueError", 3]
        made = read_texts(np.zeros((10, 20, 3), np.uint8), run, OcrConfig(engine=EVIL), ["fasttext"])
    assert [one["text"] for one in made] == ["EXIT", "ВЫХОД"]
    assert made[0]["box"] == [0.1, 0.1, 0.5, 0.4]
    assert [script(one["text"]) for one in made] == ["LATIN", "CYRILLIC"]


def test_an_engine_that_is_missing_is_one_sentence() -> None:
    with pytest.raises(ConfigurationError, match=r"ocr.engine='nowhere:Engine' cannot be loaded"):
        BoundedEngine(OcrConfig(engine="nowhere:Engine"))(np.zeros((4, 4, 3), np.uint8))


def sign(*lines: str) -> np.ndarray:
    image = Image.new("RGB", (420, 60 * len(lines) + 20), "white")
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((20, 10 + 60 * number), line, "black", ImageFont.truetype(DEJAVU, 36))
    return np.asarray(image)


GREEK = Path(TESSDATA[1], "ell.traineddata")


@pytest.mark.skipif(not GREEK.exists(), reason="no tesseract: as root, `make tools`")
def test_tesseract_reads_several_scripts_in_order() -> None:
    config = OcrConfig(engine="tesseract", languages=["eng", "rus", "ell"])
    with BoundedEngine(config) as run:
        made = read_texts(sign("Open every day", "Открыто сегодня", "Ανοιχτό σήμερα"), run, config, ["fasttext"])
    found = unicodedata.normalize("NFKC", " ".join(one["text"] for one in made))  # it writes a micro sign for a mu
    assert found == "Open every day Открыто сегодня Ανοιχτό σήμερα"
    assert [one["language"] for one in made] == ["en"] * 3 + ["ru"] * 2 + ["el"] * 2
    assert made[0]["box"][0] < made[3]["box"][0] < made[5]["box"][0] and 0 <= made[0]["box"][1] < made[1]["box"][1] <= 1
    with pytest.raises(ConfigurationError, match="apt-get install tesseract-ocr-tlh"):
        BoundedEngine(OcrConfig(engine="tesseract", languages=["tlh"]))(np.zeros((4, 4, 3), np.uint8))


def test_rapidocr_reads_a_line() -> None:
    config = OcrConfig(engine="rapidocr", timeout_s=60)
    with BoundedEngine(config) as run:
        made = read_texts(sign("Welcome home"), run, config, [])
    assert "welcomehome" in "".join(one["text"] for one in made).replace(" ", "").lower()
