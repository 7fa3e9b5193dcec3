"""Examples are assigned to few rows, none overflows, and streams get equally many."""

import numpy as np
import pytest

from data.row_assignment import assign_rows, stream_of_rows

CAPACITY = np.array([4672, 400, 16])


def sizes(seed: int, number: int) -> np.ndarray:
    """Encoder positions, decoder positions and images: 94 % with an image of 256 positions, the others long texts."""
    rng = np.random.default_rng(seed)
    image = rng.random(number) < 0.94
    text = np.where(image, 12 + rng.lognormal(2.5, 0.8, number), rng.integers(60, 512, number)).astype(np.int64)
    target = np.where(image, 1 + rng.lognormal(2.4, 0.8, number), text // 4).astype(np.int64)
    return np.stack([text + 256 * image, np.minimum(target, 192), image], 1)


@pytest.mark.parametrize("seed", range(3))
def test_a_pool_fills_its_rows(seed: int) -> None:
    found = sizes(seed, 256)
    rows, number = assign_rows(found, CAPACITY, 16)
    for dimension, most in enumerate(CAPACITY):
        assert np.bincount(rows, found[:, dimension], number).max() <= most
    assert number == 16 and found[:, 0].sum() / (number * CAPACITY[0]) > 0.95
    assert set(rows) == set(range(number))


def test_it_does_not_depend_on_anything_else() -> None:
    first, again = assign_rows(sizes(0, 128), CAPACITY, 8), assign_rows(sizes(0, 128), CAPACITY, 8)
    assert first[1] == again[1] and np.array_equal(first[0], again[0])
    assert first[0][0] == 0 and (np.diff([np.flatnonzero(first[0] == row)[0] for row in range(first[1])]) > 0).all()


def test_what_fits_no_row_together_gets_a_row_each() -> None:
    rows, number = assign_rows(np.array([[6, 1], [6, 1], [1, 9], [1, 9]]), np.array([10, 10]))
    assert number == 2 and rows[0] != rows[1] and rows[2] != rows[3]
    rows, number = assign_rows(np.array([[6, 6]] * 3), np.array([10, 10]))
    assert number == 3 and sorted(rows) == [0, 1, 2]
    rows, number = assign_rows(np.zeros((0, 3), np.int64), CAPACITY)
    assert len(rows) == number == 0


@pytest.mark.parametrize(("streams", "expected"), [(1, 20), (21, 21), (11, 20), (20, 20), (10, 20)])
def test_few_rows_are_added_so_that_streams_get_equally_many(streams: int, expected: int) -> None:
    """40 halves fill 20 rows; one row more is a twentieth, two are too many."""
    rows, number = assign_rows(np.full((40, 1), 5), np.array([10]), streams)
    assert number == expected and np.bincount(rows).max() == 2


@pytest.mark.parametrize("number", [1, 3, 7, 16, 17, 40])
def test_any_run_of_streams_gets_its_share_of_the_rows(number: int) -> None:
    counts = np.bincount(stream_of_rows(number, 16), minlength=16)
    for ranks in (1, 2, 4, 8, 16):
        of_ranks = counts.reshape(ranks, -1).sum(1)
        assert of_ranks.sum() == number and of_ranks.max() - of_ranks.min() <= 1
