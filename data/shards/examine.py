"""Find the samples of a tar, and what each of them holds, as the columns of an index."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.progress import beat
from data import fields
from data.shards import contents, files
from data.shards.index import SCATTERED_COLUMNS, Columns
from data.shards.sample import SCATTERED, entries, pattern
from data.shards.scan import BLOCK, NUM_KINDS, ShardIndex, scan_file
from data.skip import Skip

LARGEST_MEMBER = 16 << 20  # bytes; a sample with a larger one is kept as scattered, whose sizes are known unread
LARGEST_SAMPLE = 3 * LARGEST_MEMBER + (1 << 20)

Read = Callable[[int, int], bytes]


def examine(path: str, field_map: Mapping[str, Any], max_member: int) -> Columns:
    """Return the columns of a tar. `max_member`: bytes of the largest member that is read.

    Raises OSError. All other faults are in the columns.
    """
    return _examine(path, field_map, max_member)


def nothing(defect: str) -> Columns:
    """Return the columns of a tar that cannot be read."""
    no_numbers, no_sizes = np.zeros(0, np.uint32), np.zeros((0, 2), np.uint16)
    scattered = np.zeros((0, SCATTERED_COLUMNS), np.int64)
    return Columns(no_numbers, no_numbers, no_sizes, no_numbers, no_numbers, scattered, [], defect=defect)


def places(path: str) -> Columns:
    """Return the columns of a tar without what its records hold, to compare them with an index."""
    return _examine(path, None, 0)


def _examine(path: str, field_map: Mapping[str, Any] | None, max_member: int) -> Columns:
    stamp = files.stamp(path) if files.is_url(path) else None
    with files.local(path) as place:
        handle = files.Handle(place)
        with open(place, "rb") as file:
            found = scan_file(file, stamp or handle.stamp())
        return columns(found, handle.read, field_map, max_member)


def columns(found: ShardIndex, read: Read, field_map: Mapping[str, Any] | None, max_member: int) -> Columns:
    """Return the columns of a tar that was scanned; without a field map, no member is read."""
    number = len(found.keys)
    profiles, numbers = np.zeros(number, np.uint32), dict[str, int]()
    image_sizes = np.zeros((number, 2), np.uint16)
    begins, lengths = np.zeros((2, number), np.uint32)
    scattered: list[list[int]] = []
    for row in range(number):
        if row % 1000 == 0:
            beat()
        spans, headers = found.spans[row], found.headers[row]
        begin, end, together = _extent(spans, headers)
        sample = read(begin, end - begin) if together else b""
        inside = [(int(offset) - begin if size >= 0 else 0, int(size)) for offset, size in spans]
        chosen = pattern(entries(sample), found.keys[row], inside) if together else SCATTERED
        if chosen == SCATTERED or begin // BLOCK >= 1 << 32:
            first = headers[np.argmin(np.where(spans[:, 1] >= 0, headers[:, 0], np.iinfo(np.int64).max))]
            begins[row], lengths[row] = len(scattered), SCATTERED << 24
            scattered.append([*spans.reshape(-1).tolist(), *first.tolist()])
        else:
            begins[row], lengths[row] = begin // BLOCK, chosen << 24 | -(-(end - begin) // BLOCK)
        if field_map is None:
            continue
        if sample:
            members = [sample[o : o + n] if 0 <= n <= max_member else None for o, n in inside]
        else:
            members = [read(int(o), int(n)) if 0 <= n <= max_member else None for o, n in spans]
        name = contents.UNKNOWN if spans[:, 1].max() > max_member else _profile(members, field_map)
        profiles[row] = numbers.setdefault(name, len(numbers))
        image_sizes[row] = contents.image_size(members[2])
    rows = np.array(scattered, np.int64).reshape(-1, SCATTERED_COLUMNS)
    hashes = (found.hashes >> np.uint64(32)).astype(np.uint32)
    facts = found.stamp, found.defect, found.members, found.left_out
    return Columns(hashes, profiles, image_sizes, begins, lengths, rows, list(numbers), *facts)


def _extent(spans: NDArray[np.int64], headers: NDArray[np.int64]) -> tuple[int, int, bool]:
    """Return the begin and end of a sample with its headers, and whether it can be read in one piece."""
    there = spans[:, 1] >= 0
    begin = int(headers[there, 0].min())
    end = int((spans[there].sum(-1)).max())
    most = int(spans[there, 1].sum()) + (1 << 20)
    sizes_fit = spans[:, 1].max() <= LARGEST_MEMBER and end - begin <= min(LARGEST_SAMPLE, most)
    return begin, end, bool(sizes_fit and begin % BLOCK == 0 and begin < end)


def _profile(members: list[bytes | None], field_map: Mapping[str, Any]) -> str:
    json_bytes, text, _ = members[:NUM_KINDS]
    try:
        return contents.profile(fields.parse(json_bytes, text, field_map))
    except Skip:
        return contents.UNKNOWN
