"""Each record comes once an epoch, for every size, and orders of different keys have nothing in common."""

import numpy as np
import pytest

from data.permutation import feistel, permuted


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 4097])
@pytest.mark.parametrize("key", [0, 12345678901234567890])
def test_each_place_has_a_record_of_its_own(size, key):
    assert sorted(permuted(place, size, key) for place in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [2**16 - 1, 2**16 + 1, 2**18 + 1, 2**20 + 1])
def test_so_it_is_where_an_index_shuffle_of_half_the_bits_repeats_one(size):
    """Grain's repeats one record and leaves one out at 2^16 + 1, 2^18 + 1, …"""
    bits = (size - 1).bit_length()
    found = feistel(np.arange(size, dtype=np.uint64), bits, 77)
    while (outside := found >= size).any():
        found[outside] = feistel(found[outside], bits, 77)
    assert np.array_equal(np.sort(found), np.arange(size))
    places = (0, 1, size // 2, size - 1)
    assert [permuted(place, size, 77) for place in places] == found[list(places)].tolist()


@pytest.mark.parametrize("size", [2**32 + 1, 9_600_000_000, 2**63 + 5])
def test_sizes_above_32_bits(size):
    found = {permuted(place, size, 5) for place in [*range(1000), size - 1]}
    assert len(found) == 1001 and max(found) > size // 2 and max(found) < size


def test_a_place_outside_is_an_error():
    for place, size in ((3, 3), (-1, 3), (0, 0), (0, 1 << 64)):
        with pytest.raises(ValueError, match=f"place {place} of {size}"):
            permuted(place, size, 0)


def test_orders_are_even_and_independent():
    """Where a place's record goes over many keys, and what follows a record, is as even as chance makes it."""
    keys, size = 4000, 12
    first = np.array([[permuted(place, size, key) for place in (0, 1)] for key in range(keys)])
    counts = np.bincount(first[:, 0], minlength=size)
    pairs = np.bincount(first[:, 0] * size + first[:, 1], minlength=size * size).reshape(size, size)
    assert not pairs.diagonal().any()
    chi = ((counts - keys / size) ** 2 / (keys / size)).sum()
    due = keys / (size * (size - 1))
    chi_of_pairs = ((pairs[~np.eye(size, dtype=bool)] - due) ** 2 / due).sum()
    assert chi < 31.3 and chi_of_pairs < 186  # 0.1 % of chance is above, at 11 and 131 degrees of freedom
    fixed = sum(permuted(place, 10_000, 9) == place for place in range(10_000))
    assert fixed < 8 and abs(np.corrcoef([permuted(p, 10_000, 9) for p in range(10_000)], range(10_000))[0, 1]) < 0.04
