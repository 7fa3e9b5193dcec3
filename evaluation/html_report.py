"""Write `report.html`: every prediction with its image, to be filtered by task, language, right or wrong.

One file without links: it opens from a disk, without a network. Texts travel as JSON in a script element and reach the
page as text alone, so a prediction with markup shows its markup.
"""

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.files import write_text

IMAGE_SIZE = 168  # pixels of a side in the page
IMAGE_QUALITY = 80
PAGE = Path(__file__).with_name("report.html")
SCORES, ENTRIES = "/*SCORES*/", "/*ENTRIES*/"


@dataclass(frozen=True)
class Entry:
    """One prediction of the page."""

    task: str
    id: str
    language: str
    prompt: str
    references: Sequence[str]
    prediction: str
    score: float | None
    """Of the task's first metric; None where the item has none."""
    right: bool
    blind: str | None = None
    image: str = ""
    """A data URL; empty without an image."""


def data_url(pixels: NDArray[np.uint8]) -> str:
    """Return uint8 [S, S, 3] as a JPEG of the page's size."""
    image, content = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    image.save(content, format="JPEG", quality=IMAGE_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def write_report(path: Path, title: str, scores: Mapping[str, Any], entries: Iterable[Entry]) -> None:
    """Write the page: a table of `scores` (name -> number), and the entries below it."""
    page = PAGE.read_text(encoding="utf-8")
    embedded = {"title": title, "scores": dict(scores)}
    page = page.replace(SCORES, _script_json(embedded), 1)
    write_text(path, page.replace(ENTRIES, _script_json([asdict(entry) for entry in entries]), 1))


def _script_json(content: Any) -> str:
    """Return JSON that cannot end its script element.

    Half a surrogate pair becomes the replacement character: Chromium's `--dump-dom` ends with SIGILL on one.
    """
    text = json.dumps(content, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.replace("<", "\\u003c")
