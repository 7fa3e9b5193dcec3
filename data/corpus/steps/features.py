"""Find images that share a part, such as crops, by local features: bucketed, then joined by a vote on geometry.

A feature is a point of SIFT (Lowe 2004), upright, with its descriptor as 128 bits (larger than the median or not).
Hashes of descriptors find parts of images as in Ke, Sukthankar and Huston (2004): four bands of 32 bits are the keys.
An equal band of two images is a vote, with the places of both points. Images share a part where votes agree on one
shift and scale of each axis, and spread.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigurationError
from data.corpus.config import DuplicateConfig
from data.corpus.steps import hashes
from data.corpus.steps.hashes import FEATURE, Entries, digest, entries

SIDE = 256  # pixels of the longer side that features are looked for in
CONTRAST = 0.001  # of SIFT; 0.04 by default there, which leaves soft photographs without points
WIDER = 2.0  # factor of the part of the image that a descriptor sees: more of it, and fewer alike by chance
APART = 0.02  # of a side; points that are nearer than this to a stronger one are left out
BANDS = 4
DISTANCE = 20  # bits of 128 that descriptors of one point differ by, at most
PLACES = 65_535  # steps of a side
# A vote on geometry: least votes, spread of the points and tolerance in shares of a side, and the scales of an axis.
LEAST_VOTES, SPREAD, TOLERANCE, SCALES = 7, 0.2, 0.02, (0.4, 2.5)
MOST_VOTES = 48  # of two images; of more, an even part is looked at

Places = NDArray[np.uint16]


def features(pixels: NDArray[np.uint8], number: int) -> tuple[Places, NDArray[np.uint64]]:
    """Return the strongest features of an image: places uint16 [n, 2] as (x, y), and descriptors uint64 [n, 2].

    `pixels`: uint8 [height, width, 3].
    """
    cv2 = _opencv()
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    if (factor := SIDE / max(gray.shape)) < 1:
        gray = cv2.resize(gray, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    sift = cv2.SIFT_create(contrastThreshold=CONTRAST)
    sides = np.array(gray.shape[::-1], float)
    points = _strongest(sift.detect(gray, None), sides, number)
    if not points:
        return np.zeros((0, 2), np.uint16), np.zeros((0, 2), np.uint64)
    points, found = sift.compute(gray, points)
    bits = np.packbits(found > np.median(found, 1, keepdims=True), axis=1)
    places = np.array([point.pt for point in points]) / sides * PLACES
    return places.clip(0, PLACES).astype(np.uint16), bits.view("<u8").astype(np.uint64)


def feature_entries(source: str, row: int, found: tuple[Places, NDArray[np.uint64]], flags: int) -> list[Entries]:
    """Return the entries of an image's features in the buckets of a source: hash = descriptor, place, 0."""
    made = []
    for place, descriptor in zip(*found, strict=True):
        keys = [digest("feature", source, band, int(value)) for band, value in enumerate(descriptor.view("<u4"))]
        x, y = map(int, place)
        payload = np.array([*descriptor, x | y << 16, 0], np.uint64)
        made.append(entries(FEATURE, row, keys, payload, flags))
    return made


def compared(source: str, row: int, pixels: NDArray[np.uint8], config: DuplicateConfig, flags: int) -> list[Entries]:
    """Return the entries of an image: of its hashes, and of its features; none if it is too plain."""
    found = hashes.image_hashes(pixels)
    made = hashes.image_entries(source, row, found, config.band_bits, flags)
    # The grain of JPEG gives two plain images the same features -> they have none.
    if found and config.features:
        made += feature_entries(source, row, features(pixels, config.features), flags)
    return made


def agreeing(places: Places) -> int:
    """Return the votes of two images that agree on one shift and scale of each axis; 0 if they do not spread.

    `places`: uint16 [votes, 4] as (x, y) in one image and (x, y) in the other.
    """
    distinct = np.unique(places, axis=0)
    votes = distinct[:: max(1, -(-len(distinct) // MOST_VOTES))] / PLACES
    if len(votes) < LEAST_VOTES:
        return 0
    one, other = np.triu_indices(len(votes), 1)
    apart = votes[one] - votes[other]
    wide = (np.abs(apart) > SPREAD / 2).all(1)
    scales = apart[wide, 2:] / apart[wide, :2]
    likely = ((scales > SCALES[0]) & (scales < SCALES[1])).all(1)
    start, scales = votes[one][wide][likely], scales[likely]
    if not len(start):
        return 0
    expected = start[:, None, 2:] + (votes[None, :, :2] - start[:, None, :2]) * scales[:, None]
    agree = np.all(np.abs(expected - votes[None, :, 2:]) < TOLERANCE, axis=-1)  # [pairs of votes, votes]
    best = votes[agree[int(agree.sum(1).argmax())]]
    if (np.ptp(best, axis=0) < SPREAD).any():
        return 0
    return min(len(np.unique(best[:, :2], axis=0)), len(np.unique(best[:, 2:], axis=0)))


def _strongest(points: Sequence[Any], sides: NDArray[np.float64], number: int) -> list[Any]:
    """Return the strongest points, upright and widened, with a distance from each other."""
    ordered = sorted(points, key=lambda each: (-each.response, each.pt))
    chosen: list[Any] = []
    places = np.zeros((number, 2))
    for point in ordered:
        place = np.array(point.pt) / sides
        near = (np.abs(places[: len(chosen)] - place) < APART).all(1)
        if not near.any():
            places[len(chosen)] = place
            point.angle, point.size = 0.0, point.size * WIDER
            chosen.append(point)
            if len(chosen) == number:
                break
    return chosen


@functools.cache
def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ConfigurationError(
            f"duplicates.features needs OpenCV ({error}); pip install '.[corpus]', or set it to 0."
        ) from error
    cv2.setNumThreads(1)  # a rank has one core
    return cv2
