"""Choose among the records of a source those that an objective can use, by number, without a list of them.

The index keeps a profile for each record; a table gives the weight of each profile: how many items such a record has,
0 if it cannot be used. The k-th item is found from the weights before each block of records, then within its block.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common.progress import beat

BLOCK = 1024  # records
CHUNK = BLOCK * 1024  # records that are counted at a time

Numbers = NDArray[np.uint32]


class Selection(Sequence[tuple[int, int]]):
    """Give (record, item) by number, in the order of the records; item 0 is a record's first.

    `profiles`, `hashes`: by record. `table`: by profile. `part`: the records whose hash lies in [first, last), of 2^32.
    """

    def __init__(
        self,
        profiles: Numbers,
        table: NDArray[np.uint16],
        before: NDArray[np.int64] | None = None,
        hashes: Numbers | None = None,
        part: tuple[int, int] = (0, 1 << 32),
    ) -> None:
        self._profiles, self._table, self._part = profiles, table, part
        self._hashes = None if part == (0, 1 << 32) else hashes
        if before is None or self._hashes is not None:
            before = counts_before(profiles, table, self._hashes, part)
        self._before = before

    def __len__(self) -> int:
        return int(self._before[-1])

    def __getitem__(self, number):  # type: ignore[no-untyped-def, override]
        if not 0 <= number < len(self):
            raise IndexError(number)
        block = int(np.searchsorted(self._before, number, side="right")) - 1
        rows = slice(block * BLOCK, (block + 1) * BLOCK)
        ends = np.cumsum(_weights(rows, self._profiles, self._table, self._hashes, self._part), dtype=np.int64)
        left = int(number) - int(self._before[block])
        within = int(np.searchsorted(ends, left, side="right"))
        return rows.start + within, left - (int(ends[within - 1]) if within else 0)


def counts_before(
    profiles: Numbers,
    table: NDArray[np.uint16],
    hashes: Numbers | None = None,
    part: tuple[int, int] = (0, 1 << 32),
) -> NDArray[np.int64]:
    """Return the sum of the weights of all records before each block, and of all records at the end."""
    before = np.zeros(-(-len(profiles) // BLOCK) + 1, np.int64)
    for start in range(0, len(profiles), CHUNK):
        beat()
        found = _weights(slice(start, start + CHUNK), profiles, table, hashes, part)
        sums = np.add.reduceat(found, range(0, len(found), BLOCK), dtype=np.int64)
        before[start // BLOCK + 1 : start // BLOCK + 1 + len(sums)] = sums
    return np.cumsum(before)


def _weights(
    rows: slice, profiles: Numbers, table: NDArray[np.uint16], hashes: Numbers | None, part: tuple[int, int]
) -> NDArray[np.uint16]:
    found: NDArray[np.uint16] = table[profiles[rows]]
    if hashes is None:
        return found
    own = hashes[rows]
    return np.where((own >= part[0]) & (own < part[1]), found, 0)
