"""Define scenes: things and their positions, without pixels or words."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np

COLORS = ("red", "green", "blue", "yellow", "purple", "black", "white")
KINDS = ("circle", "square", "triangle", "star", "heart", "cross")
SIZES = ("small", "large")
BOARDS = ("white", "yellow", "blue", "green")

Pair = tuple[str, str]  # (color, kind)
Box = tuple[float, float, float, float]  # ymin, xmin, ymax, xmax as fractions of the image

PAIRS: tuple[Pair, ...] = tuple(product(COLORS, KINDS))
EXTENTS = {"small": 0.21, "large": 0.305}  # width of a shape before it is turned, as fraction of the image
MARGIN = 0.015  # least distance between two things, and to the edge
MAX_TURN = math.radians(3)
GRID = 6  # centers lie near the inner crossings of a grid of so many cells: a toy ViT learns shapes in minutes
JITTER = 0.004  # how near


@dataclass(frozen=True)
class Shape:
    """Hold one colored shape; `y`, `x` is its center, in fractions of the image, `turn` an angle in radians."""

    color: str
    kind: str
    size: str
    y: float
    x: float
    turn: float

    @property
    def pair(self) -> Pair:
        """(color, kind)."""
        return self.color, self.kind

    @property
    def label(self) -> str:
        """Color and kind in words: "red circle"."""
        return f"{self.color} {self.kind}"

    @property
    def box(self) -> Box:
        """The smallest box around the shape."""
        points = outline(self)
        (xmin, ymin), (xmax, ymax) = points.min(0), points.max(0)
        return float(ymin), float(xmin), float(ymax), float(xmax)


@dataclass(frozen=True)
class Sign:
    """Hold a board with one word, in logical order."""

    word: str
    language: str
    board: str
    box: Box

    @property
    def y(self) -> float:
        """Center of the board, as fraction of the image's height."""
        return (self.box[0] + self.box[2]) / 2

    @property
    def x(self) -> float:
        """Center of the board, as fraction of the image's width."""
        return (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """Hold up to three shapes, no two of the same color and kind, maybe a sign, and a background."""

    shapes: tuple[Shape, ...]
    sign: Sign | None
    background: tuple[tuple[int, int, int], tuple[int, int, int]]  # RGB at the top and at the bottom


def _unit_outline(kind: str) -> np.ndarray:
    """Return corner points [n, 2] (x, y; y down) of a shape around the origin that fills a square of side 1."""
    if kind == "circle":
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        points = np.stack([np.cos(angles), np.sin(angles)], 1)
    elif kind == "square":
        points = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.88
    elif kind == "triangle":
        points = np.array([(0, -1), (1, 0.85), (-1, 0.85)])
    elif kind == "star":
        angles = -np.pi / 2 + np.arange(10) * np.pi / 5
        points = np.stack([np.cos(angles), np.sin(angles)], 1) * np.where(np.arange(10) % 2, 0.42, 1.05)[:, None]
    elif kind == "heart":
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        y = 13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles)
        points = np.stack([16 * np.sin(angles) ** 3, -y - 2.5], 1) / 16
    else:
        arm = 0.34
        half = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
        points = np.array(half + [(-x, -y) for x, y in half])
    return np.asarray(points, dtype=np.float64) / 2


_OUTLINES = {kind: _unit_outline(kind) for kind in KINDS}


def outline(shape: Shape) -> np.ndarray:
    """Return corner points [n, 2] (x, y) of the shape in fractions of the image, turned and in place."""
    sine, cosine = math.sin(shape.turn), math.cos(shape.turn)
    points = _OUTLINES[shape.kind] @ np.array([[cosine, sine], [-sine, cosine]])
    return points * EXTENTS[shape.size] + (shape.x, shape.y)


def held_out_together(one: Shape, other: Shape) -> bool:
    """Return whether training never shows two such things in one scene: a seventh of all combinations.

    The rule depends on color, kind and size of both things, so that none of these alone reveals it: any two colors,
    kinds or sizes, and nearly any two pairs of color and kind, occur together in training.
    """
    return sum(COLORS.index(s.color) - KINDS.index(s.kind) + 3 * SIZES.index(s.size) for s in (one, other)) % 7 == 0


def uses_held_out(shapes: Iterable[Shape]) -> bool:
    """Return whether any two of these things are never together in a training scene."""
    return any(held_out_together(one, other) for one, other in combinations(shapes, 2))


def held_out_board(word_index: int) -> str:
    """Return the board that carries a word in test only; in train and validation the three others carry it."""
    return BOARDS[word_index % len(BOARDS)]
