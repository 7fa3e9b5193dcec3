"""Draw predictions beside their images and references."""

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
    from evaluation.text_drawing import TextDrawer

IMAGE_SIZE, TEXT_WIDTH, MARGIN, COLUMNS = 168, 300, 12, 3  # pixels, pixels, pixels, samples side by side
TEXT_SIZE = 14
MOST_LINES = 4  # of one prompt, reference or prediction
INK, GRAY, RIGHT, WRONG = (20, 20, 20), (120, 120, 120), (0, 120, 60), (180, 40, 30)


@dataclass(frozen=True)
class Sample:
    """Hold one example with its prediction."""

    source: str
    objective: str
    key: str
    language: str
    prompt: str
    references: list[str]
    prediction: str
    image: np.ndarray | None = None
    """uint8 [S, S, 3], of the few samples that are drawn."""
    blind_prediction: str | None = None
    """The prediction on a blank image."""
    has_image: bool = True
    index: int = -1
    """Its number among all held-out records."""
    component: str = ""
    """Its name in the mixture."""
    id: str = ""
    """Its item of the source."""

    @property
    def correct(self) -> bool:
        """True if the prediction equals a reference."""
        return exact_match(self.prediction, self.references) == 1.0

    @property
    def line(self) -> str:
        """The sample as one line of JSON, without its image."""
        hidden = ("image", "has_image", "index")
        return json.dumps({k: v for k, v in vars(self).items() if k not in hidden}, ensure_ascii=False)


def draw(samples: list[Sample], path: Path) -> None:
    """Write one PNG: each sample's image with its prompt, reference and prediction."""
    from evaluation.text_drawing import TextDrawer  # matplotlib and more: only where something is drawn

    drawer = TextDrawer(TEXT_SIZE)
    cells = [_cell(sample, drawer) for sample in samples]
    rows = [cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)]
    heights = [max(cell.height for cell in row) + MARGIN for row in rows]
    sheet = Image.new("RGB", (COLUMNS * (IMAGE_SIZE + TEXT_WIDTH + 3 * MARGIN), sum(heights) + MARGIN), "white")
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            sheet.paste(cell, (MARGIN + column * (IMAGE_SIZE + TEXT_WIDTH + 3 * MARGIN), top))
        top += height
    path.parent.mkdir(parents=True, exist_ok=True)
    with beside(path) as scratch:
        sheet.save(scratch, format="PNG")


def _cell(sample: Sample, drawer: "TextDrawer") -> Image.Image:
    """Draw one sample: its image left (boxes of the reference green, predicted ones red), its text right."""
    lines: list[tuple[str, tuple[int, int, int]]] = []
    for text, color in (
        (f"{sample.objective} · {sample.language}", GRAY),
        (sample.prompt, INK),
        ("reference: " + " / ".join(sample.references), GRAY),
        ("prediction: " + sample.prediction, RIGHT if sample.correct else WRONG),
    ):
        wrapped = drawer.wrapped(text, TEXT_WIDTH)
        lines += [(line, color) for line in wrapped[:MOST_LINES]]
        if len(wrapped) > MOST_LINES:
            lines[-1] = (wrapped[MOST_LINES - 1] + " …", color)
    cell = Image.new(
        "RGB", (IMAGE_SIZE + MARGIN + TEXT_WIDTH, max(IMAGE_SIZE, len(lines) * drawer.line_height)), "white"
    )
    if sample.image is not None:
        cell.paste(Image.fromarray(sample.image).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS), (0, 0))
    pen = ImageDraw.Draw(cell)
    if sample.objective == "detection":
        for text, color in ((sample.references[0], RIGHT), (sample.prediction, WRONG)):
            for ymin, xmin, ymax, xmax, _ in objectives.load("detection").read(text):
                left, right = sorted((xmin * IMAGE_SIZE, xmax * IMAGE_SIZE))
                top, bottom = sorted((ymin * IMAGE_SIZE, ymax * IMAGE_SIZE))
                pen.rectangle((left, top, right, bottom), outline=color, width=2)
    for i, (line, color) in enumerate(lines):
        drawer.write(pen, (IMAGE_SIZE + MARGIN, i * drawer.line_height), line, color)
    return cell


def drawable_first(samples: list[Sample]) -> list[Sample]:
    """Return the same samples, first those whose letters all have an installed font."""
    from evaluation.text_drawing import TextDrawer

    drawer = TextDrawer(TEXT_SIZE)
    return sorted(samples, key=lambda s: not drawer.covers("".join([s.prompt, s.prediction, *s.references])))
