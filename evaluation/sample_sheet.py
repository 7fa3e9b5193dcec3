"""Generated answers beside their pictures and references."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from common.files import beside
from data import objectives
from evaluation.text_scores import exact_match

if TYPE_CHECKING:
    from evaluation.text_drawing import Lettering

PICTURE, TEXT_WIDTH, MARGIN, COLUMNS = 168, 300, 12, 3  # pixels, pixels, pixels, samples side by side
TEXT_SIZE = 14
MOST_LINES = 4  # of one prompt, reference or prediction
INK, GREY, RIGHT, WRONG = (20, 20, 20), (120, 120, 120), (0, 120, 60), (180, 40, 30)


@dataclass(frozen=True)
class Sample:
    """One answered example.

    `picture` is uint8 [S, S, 3], of the few that are shown; `place` its number among all held-out records.
    """

    source: str
    objective: str
    key: str
    language: str
    prompt: str
    references: list[str]
    prediction: str
    picture: np.ndarray | None = None
    blind_prediction: str | None = None  # what the model answers when the image is blanked
    has_image: bool = True
    place: int = -1
    component: str = ""  # its name in the mixture

    @property
    def correct(self) -> bool:
        return exact_match(self.prediction, self.references) == 1.0

    @property
    def line(self) -> str:
        """What was asked and answered, as one line of JSON."""
        hidden = ("picture", "has_image", "place", "component")
        return json.dumps({k: v for k, v in vars(self).items() if k not in hidden}, ensure_ascii=False)


def draw(samples: list[Sample], path: Path) -> None:
    """Write one PNG: each sample's picture with its prompt, reference and prediction."""
    from evaluation.text_drawing import Lettering  # matplotlib and more: only where something is drawn

    lettering = Lettering(TEXT_SIZE)
    cells = [_cell(sample, lettering) for sample in samples]
    rows = [cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)]
    heights = [max(cell.height for cell in row) + MARGIN for row in rows]
    sheet = Image.new("RGB", (COLUMNS * (PICTURE + TEXT_WIDTH + 3 * MARGIN), sum(heights) + MARGIN), "white")
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            sheet.paste(cell, (MARGIN + column * (PICTURE + TEXT_WIDTH + 3 * MARGIN), top))
        top += height
    path.parent.mkdir(parents=True, exist_ok=True)
    with beside(path) as scratch:
        sheet.save(scratch, format="PNG")


def _cell(sample: Sample, lettering: "Lettering") -> Image.Image:
    """One sample: the picture left (boxes of the reference green, predicted ones red), its lines of text right."""
    lines: list[tuple[str, tuple[int, int, int]]] = []
    for text, colour in (
        (f"{sample.objective} · {sample.language}", GREY),
        (sample.prompt, INK),
        ("reference: " + " / ".join(sample.references), GREY),
        ("prediction: " + sample.prediction, RIGHT if sample.correct else WRONG),
    ):
        wrapped = lettering.wrapped(text, TEXT_WIDTH)
        lines += [(line, colour) for line in wrapped[:MOST_LINES]]
        if len(wrapped) > MOST_LINES:
            lines[-1] = (wrapped[MOST_LINES - 1] + " …", colour)
    cell = Image.new("RGB", (PICTURE + MARGIN + TEXT_WIDTH, max(PICTURE, len(lines) * lettering.line_height)), "white")
    if sample.picture is not None:
        cell.paste(Image.fromarray(sample.picture).resize((PICTURE, PICTURE), Image.Resampling.LANCZOS), (0, 0))
    pen = ImageDraw.Draw(cell)
    if sample.objective == "detection":
        for text, colour in ((sample.references[0], RIGHT), (sample.prediction, WRONG)):
            for ymin, xmin, ymax, xmax, _ in objectives.load("detection").read(text):
                left, right = sorted((xmin * PICTURE, xmax * PICTURE))
                top, bottom = sorted((ymin * PICTURE, ymax * PICTURE))
                pen.rectangle((left, top, right, bottom), outline=colour, width=2)
    for i, (line, colour) in enumerate(lines):
        lettering.write(pen, (PICTURE + MARGIN, i * lettering.line_height), line, colour)
    return cell


def drawable_first(samples: list[Sample]) -> list[Sample]:
    """The same samples, those first whose every letter an installed font can show."""
    from evaluation.text_drawing import Lettering

    lettering = Lettering(TEXT_SIZE)
    return sorted(samples, key=lambda s: not lettering.covers("".join([s.prompt, s.prediction, *s.references])))
