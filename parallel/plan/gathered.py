"""Decide which units ZeRO-3 keeps gathered from their forward to their backward pass."""

from collections.abc import Sequence

MOST_KEPT = 10**9  # elements: 2 GB in bf16


def num_kept(elements: Sequence[float]) -> int:
    """Return how many units, counted from the last one, stay gathered where the backward pass follows at once.

    `elements`: of each unit, on a rank. Together they have at most `MOST_KEPT`.
    """
    total = 0.0
    for number, size in enumerate(reversed(elements)):
        total += size
        if total > MOST_KEPT:
            return number
    return len(elements)
