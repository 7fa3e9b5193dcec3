"""Draw lengths of the paper's examples by objective, in mT5 pieces: a table of realistic lengths without any corpus.

WebLI cannot be had, so each number is a published mean or an assumption, as `source` names. Words become mT5 pieces by
PIECES_PER_WORD, an assumption for text in many languages.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data.interleave import interleave
from data.objectives.span_corruption import num_noise, raw_length

PIECES_PER_WORD = 1.5
SPAN_INPUT = 512  # T5's and mT5's input length (Raffel et al. 2020, 3.1; Xue et al. 2021, 3.2)
Draw = Callable[[np.random.Generator, int], tuple[float, float]]


@dataclass(frozen=True)
class Lengths:
    """Hold an objective's weight in the paper's mixture, and a draw of its prompt and target in pieces, without EOS."""

    weight: float
    draw: Draw
    source: str
    has_image: bool = True


def lognormal(rng: np.random.Generator, mean: float, deviation: float) -> float:
    """Draw from the log-normal distribution with this mean and standard deviation."""
    variance = np.log(1 + (deviation / mean) ** 2)
    return float(rng.lognormal(np.log(mean) - variance / 2, np.sqrt(variance)))


def _span(rng: np.random.Generator, decoder_length: int) -> tuple[float, float]:
    document, longest = max(int(lognormal(rng, 955, 1200)), 2), raw_length(SPAN_INPUT, 0.15, 3.0, decoder_length)
    if document > longest:  # one of its chunks, as data.objectives.span_corruption draws it
        document = max(min(longest, document - longest * int(rng.integers(-(-document // longest)))), 2)
    noise, spans = num_noise(document, 0.15, 3.0)
    return document - noise + spans, noise + spans


def _split(rng: np.random.Generator, decoder_length: int) -> tuple[float, float]:
    words = max(int(lognormal(rng, 20.2, 16.3)), 1)
    given = int(rng.integers(words))
    return 15 + PIECES_PER_WORD * given, PIECES_PER_WORD * (words - given)


def _detection(rng: np.random.Generator, decoder_length: int) -> tuple[float, float]:
    boxes = max(int(lognormal(rng, 15.8, 12)), 1)
    return 6 + 4 * min(boxes, 6), 12 * min(boxes, (decoder_length - 1) // 12)


LENGTHS = {
    "span_corruption": Lengths(
        100, _span, "mC4: 6.3 T pieces / 6.6 G pages = 955 a page (Xue et al. 2021, table 1); deviation assumed", False
    ),
    "split_captioning": Lengths(
        1000, _split, "alt-texts as CC12M's: 20.2 words, deviation 16.3 (Changpinyo et al. 2021, table 1)"
    ),
    "captioning": Lengths(
        100,
        lambda rng, _: (15, PIECES_PER_WORD * max(lognormal(rng, 10.3, 4.5), 1)),
        "CC3M: 10.3 words, deviation 4.5 (Sharma et al. 2018, table 1), translated",
    ),
    "ocr": Lengths(100, lambda rng, _: (13, lognormal(rng, 60, 60)), "assumed: 60 pieces, deviation 60"),
    "vqa": Lengths(
        100,
        lambda rng, _: (7 + lognormal(rng, 12, 4), lognormal(rng, 3, 2)),
        "assumed: questions of 8 words as VQA's, answers of 3 pieces",
    ),
    "vqg": Lengths(100, lambda rng, _: (14 + lognormal(rng, 3, 2), lognormal(rng, 12, 4)), "as vqa, turned around"),
    "object_vqa": Lengths(
        50, lambda rng, _: (11 + lognormal(rng, 12, 10), lognormal(rng, 6, 8)), "assumed: some labels of 2 pieces"
    ),
    "detection": Lengths(
        16, _detection, "Objects365: 15.8 boxes an image (Shao et al. 2019, table 1), 12 pieces a box; whole boxes kept"
    ),
}
STAGE_2 = ("ocr", "captioning", "vqa")


def draw(
    rng: np.random.Generator, number: int, tokens_per_image: int, decoder_length: int, scale: float = 1.0,
    names: tuple[str, ...] = tuple(LENGTHS), equally: bool = False,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Return objectives, int64 [number], and sizes, int64 [number, 3]: encoder, decoder positions and images of each.

    Objectives come in the order in which a mixture of these weights has them, from a random place on.
    `scale` multiplies the lengths of texts that are not span corruption's; `equally`: all objectives in equal parts.
    """
    order = interleave(tuple(1.0 if equally else LENGTHS[name].weight for name in names))
    first = int(rng.integers(len(order.components)))
    chosen = np.array([order.place(first + place)[0] for place in range(number)])
    sizes = np.zeros((number, 3), np.int64)
    for row, objective in zip(sizes, chosen, strict=True):
        one = LENGTHS[names[objective]]
        prompt, target = one.draw(rng, decoder_length)
        factor = scale if one.has_image and names[objective] != "detection" else 1.0
        row[:] = tokens_per_image * one.has_image + int(factor * prompt) + 1, int(factor * target) + 1, one.has_image
    sizes[:, 1] = np.clip(sizes[:, 1], 2, decoder_length)
    return chosen, sizes
