"""Figures of a card show what was counted."""

import io
from itertools import groupby

import numpy as np
import pytest
from PIL import Image, ImageColor

from data.corpus.card.figures import INK, MOST_BARS, bars, histogram


def ink(png: bytes) -> np.ndarray:
    """Return where an image has the color of bars: bool [H, W]."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    return (pixels == ImageColor.getrgb(INK)).all(2)


def lengths(line: np.ndarray) -> list[int]:
    """Return the lengths (pixels) of the runs of ink in a line."""
    return [sum(1 for _ in own) for is_ink, own in groupby(line.tolist()) if is_ink]


@pytest.mark.parametrize("counts", [{3: 4, 4: 4}, {1: 8, 2: 4, 5: 2}, dict.fromkeys(range(5, 30), 7)])
def test_a_histogram_has_a_bar_for_each_bin_as_high_as_its_count(counts: dict[int, int]) -> None:
    drawn = ink(histogram("words", counts))
    foot = drawn[np.flatnonzero(drawn.any(1))[-1]]
    assert len(lengths(foot)) == len(counts)
    columns = np.flatnonzero(np.diff(foot, prepend=False) & foot) + 1
    heights = [int(drawn[:, column].sum()) for column in columns]
    most = max(counts.values())
    assert heights == pytest.approx([max(heights) * count / most for count in counts.values()], abs=2)


def test_bars_are_as_long_as_their_counts_and_at_most_so_many() -> None:
    drawn = ink(bars("Languages", [("en", 100), ("de", 50), ("fr", 25)]))
    left = np.flatnonzero(drawn.any(0))[0] + 1
    rows = np.flatnonzero(np.diff(drawn[:, left], prepend=False) & drawn[:, left]) + 1
    widths = [int(drawn[row].sum()) for row in rows]
    assert widths == pytest.approx([max(widths) * share for share in (1, 0.5, 0.25)], abs=2)
    many = ink(bars("Languages", [(f"l{n}", 9) for n in range(MOST_BARS + 5)]))
    assert len(lengths(many[:, np.flatnonzero(many.any(0))[0] + 1])) == MOST_BARS
