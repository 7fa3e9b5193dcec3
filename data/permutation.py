"""Shuffle any number of records without a list of them: a bijection of 0 … size-1 that is computed place by place.

A Feistel network permutes the numbers of just enough bits, and is applied again while its result is no record
(cycle-walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Each of its rounds can be undone,
so each record comes exactly once, for every size below 2^64.
"""

from typing import Any

ROUNDS = 12
MASK = (1 << 64) - 1


def permuted(place: int, size: int, key: int) -> int:
    """Return the record at a place, 0 <= place < size, of the shuffle that `key` (64 bits) names."""
    if not 0 <= place < size <= MASK:
        raise ValueError(f"place {place} of {size}")
    bits = max(2, (size - 1).bit_length())
    found = feistel(place, bits, key)
    while found >= size:
        found = feistel(found, bits, key)
    return int(found)


def feistel(number: Any, bits: int, key: int) -> Any:
    """Permute the numbers of so many bits, 2 to 64; a number or a uint64 array."""
    low = bits // 2
    halves = (1 << low) - 1, (1 << (bits - low)) - 1
    right, left = number & halves[0], number >> low
    for turn in range(ROUNDS):
        if turn % 2:
            left = left ^ (_mixed(right, key, turn) & halves[1])
        else:
            right = right ^ (_mixed(left, key, turn) & halves[0])
    return (left << low) | right


def _mixed(number: Any, key: int, turn: int) -> Any:
    """Mix the bits of a half, as SplitMix64 (Steele, Lea and Flood, 2014) does those of its state."""
    number = (number ^ ((key + 0x9E3779B97F4A7C15 * (turn + 1)) & MASK)) & MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & MASK
    return number ^ (number >> 31)
