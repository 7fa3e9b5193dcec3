"""Buckets of gradients: which units share one, and the bytes of those that are filled and sent, counted by hand."""

import pytest

from parallel.plan.buckets import BUCKET_ELEMENTS as FULL
from parallel.plan.buckets import Sending, held_in_backward, joined


def test_small_neighbors_share_a_bucket_and_units_of_nothing_have_none() -> None:
    assert joined([FULL / 2, FULL / 2, 0, 1]) == [[3, 1], [0]]
    assert joined([1, FULL + 1, 1]) == [[2], [1], [0]]
    assert joined([0, 0]) == []


def test_one_is_filled_while_two_are_on_their_way() -> None:
    """Of 4 ranks: fp32 takes 4 bytes an element, and a received shard a quarter of them."""
    found, after = held_in_backward([10 * FULL, 0, 8 * FULL, 4 * FULL, 2 * FULL], Sending(4, 4, False, True))
    flying = [size * 4 * FULL * 1.25 for size in (2, 4, 8)]
    last = 4 * FULL * (0.5 + 10) + flying[1] + flying[2]  # the shard of the first one has arrived
    assert found[1] == 0 and after == flying[2] + 4 * FULL * 10 * 1.25
    assert found[4] == 4 * FULL * (2 + 0.5) and found[3] == flying[0] + 4 * FULL * (4 + 1)
    assert found[2] == max(flying[0] + flying[1] + 4 * FULL * 8, 4 * FULL * (0.5 + 8 + 2) + flying[1])
    assert found[0] == max(last, 4 * FULL * (0.5 + 1 + 10 + 2.5) + flying[2])


@pytest.mark.parametrize("keeps_sums", [True, False])
def test_whole_gradients_take_shards_alone_or_copies_in_16_bits(keeps_sums: bool) -> None:
    sizes = [2 * FULL, 2 * FULL, 2 * FULL, 2 * FULL]
    found, after = held_in_backward(sizes, Sending(2, 4, True, keeps_sums))
    assert found[::-1] == [4 * FULL * n for n in (1, 2, 3, 4)] and after == 4 * FULL * 4
    found, after = held_in_backward(sizes, Sending(2, 2, True, keeps_sums))
    one = 2 * FULL * 2 * 1.5  # a copy in 16 bits, and the shard of the sum
    assert found[::-1] == [one, 2 * one, *(2 * one + keeps_sums * 4 * FULL * n for n in (1, 2))] and after == 2 * one


def test_a_bucket_of_several_units_exists_from_its_first_one_on() -> None:
    found, after = held_in_backward([FULL / 4] * 3, Sending(2, 4, False, True))
    assert found == [4 * FULL * 0.75 * 1.5, 4 * FULL * 0.75, 4 * FULL * 0.75] and after == found[0]
