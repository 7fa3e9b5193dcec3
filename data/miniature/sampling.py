"""Draw scenes at random; this file decides all frequencies."""

from dataclasses import dataclass

import numpy as np

from data.miniature.language import sign_words
from data.miniature.scene import (
    BOARDS,
    GRID,
    JITTER,
    MARGIN,
    MAX_TURN,
    PAIRS,
    SIZES,
    Box,
    Pair,
    Scene,
    Shape,
    Sign,
    held_out_board,
    uses_held_out,
)
from data.miniature.text_image import sign_extent

ATTEMPTS = 40  # positions tried for a thing before the whole scene is laid out anew


@dataclass(frozen=True)
class SceneOptions:
    """Hold the frequencies of one source: scenes with a sign, and 1, 2 and 3 shapes in those without."""

    sign_share: float
    num_shapes: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)
    aligned_signs: bool = False


def draw_scene(rng: np.random.Generator, options: SceneOptions, split: str) -> Scene:
    """Draw a scene: with two things that are held out together in the test split, without such in the others."""
    signed = rng.random() < options.sign_share
    # Beside a sign there is no room for three large shapes.
    number = 1 + int(rng.choice(3, p=options.num_shapes) if not signed else rng.integers(2))
    number = max(number, 2) if split == "test" else number
    while True:
        scene = _lay_out(rng, _draw_pairs(rng, number), signed, split, options.aligned_signs)
        if scene is not None and uses_held_out(scene.shapes) == (split == "test"):
            return scene


def _draw_pairs(rng: np.random.Generator, number: int) -> list[Pair]:
    """Draw distinct pairs in random order; in half of the scenes some share a color, for questions that count."""
    first = PAIRS[rng.integers(len(PAIRS))]
    pairs = [first]
    same_color = number > 1 and rng.random() < 0.5
    num_same = int(rng.integers(2, number + 1)) if same_color else 1
    while len(pairs) < number:
        pair = PAIRS[rng.integers(len(PAIRS))]
        if pair in pairs:
            continue
        if (pair[0] == first[0]) == (len(pairs) < num_same):
            pairs.append(pair)
    return [pairs[index] for index in rng.permutation(number)]


def _lay_out(rng: np.random.Generator, pairs: list[Pair], signed: bool, split: str, aligned: bool) -> Scene | None:
    """Find free places for all things; return None if one does not fit."""
    taken: list[Box] = []
    sign = _draw_sign(rng, split, aligned) if signed else None
    if sign:
        taken.append(sign.box)
    shapes = []
    for color, kind in pairs:
        size = SIZES[rng.integers(2)]
        turn = float(rng.uniform(-MAX_TURN, MAX_TURN))
        for _ in range(ATTEMPTS):
            crossing = rng.integers(1, GRID, 2) / GRID
            y, x = (float(value) for value in crossing + rng.uniform(-JITTER, JITTER, 2))
            shape = Shape(color, kind, size, y, x, turn)
            box = shape.box
            if not any(_touch(box, other) for other in taken):
                taken.append(box)
                shapes.append(shape)
                break
        else:
            return None
    return Scene(tuple(shapes), sign, _draw_background(rng))


def _draw_sign(rng: np.random.Generator, split: str, aligned: bool) -> Sign:
    words = sign_words()
    index = int(rng.integers(len(words)))
    word, code = words[index]
    held_out = held_out_board(index)
    boards = [held_out] if split == "test" else [board for board in BOARDS if board != held_out]
    height, width = sign_extent(word)
    if aligned:
        # The word lies in the middle of a row of cells, and the board begins at a column.
        ymin = (int(rng.integers(1, GRID - 1)) + 0.5) / GRID - height / 2 + float(rng.uniform(-JITTER, JITTER))
        column = int(rng.integers(int((1 - 2 * MARGIN - width) * GRID) + 1))
        xmin = MARGIN + column / GRID + float(rng.uniform(-JITTER, JITTER))
    else:
        ymin = float(rng.uniform(MARGIN, 1 - MARGIN - height))
        xmin = float(rng.uniform(MARGIN, 1 - MARGIN - width))
    return Sign(word, code, boards[rng.integers(len(boards))], (ymin, xmin, ymin + height, xmin + width))


def _draw_background(rng: np.random.Generator) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Draw two similar grays with a tint: white, yellow and black differ clearly from all of them."""
    base = rng.integers(135, 185) + rng.integers(-12, 13, 3)
    red, green, blue = (int(value) for value in base)
    shift = int(rng.integers(-15, 16))
    return (red, green, blue), (red + shift, green + shift, blue + shift)


def _touch(one: Box, other: Box) -> bool:
    return (
        one[0] < other[2] + MARGIN
        and other[0] < one[2] + MARGIN
        and one[1] < other[3] + MARGIN
        and other[1] < one[3] + MARGIN
    )
