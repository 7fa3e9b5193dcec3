"""Scan tars: find the members of each sample, for random access.

A sample is the members of one key: the part of a member's name before its first dot, as in WebDataset.
`photo.3.v2.jpg` belongs to `photo` if there is a `photo.jpg` or `photo.json` (it is an extra then, as `photo.seg.png`
is), else dots are part of the key: `photo.3.v2`. Members of a key may lie anywhere in the tar. Members that cannot be
used are counted by cause.
"""

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from posixpath import dirname, join, normpath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from common.progress import beat

# The members of a sample that are read; columns of `spans` in this order.
KINDS = {"json": 0, "txt": 1, "jpg": 2, "jpeg": 2, "png": 2, "webp": 2}
NUM_KINDS, IMAGE = 3, 2
BLOCK = tarfile.BLOCKSIZE
LONGEST_CHAIN = 40  # links to links; Linux follows as many
LONGEST_HEADER = 1 << 20  # bytes; PAX and GNU headers hold a name, and no more
BEHIND = 1 << 20  # bytes after a tar's end that must be zero; tar itself writes up to 10 kB of zeros
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}

# Causes of members that are left out: harmless ones, a consequence of a truncated tar, and defects.
OTHER_KIND, HIDDEN = "member of another kind", "hidden member"
CUT = "member of a sample cut short"
TWICE, NO_TARGET = "second member of a kind for one key", "link to no member"
TRUNCATED = "truncated tar"
SPARSE, NO_FILE = "sparse member", "member that is no file"
DEFECTS = (TWICE, NO_TARGET, SPARSE, NO_FILE)


@dataclass(frozen=True)
class ShardIndex:
    """Hold the samples of a tar and their places in it.

    `spans`: int64 [samples, NUM_KINDS, 2], offset and size in bytes, size -1 where absent. `headers`: int64, as spans,
    offset and size of the members' headers. `hashes`: uint64 [samples], of the keys. `stamp`: the tar's size and
    modification time (ns). `defect`: the fault of the tar as a whole, or None. `members`: the number of its files and
    links; each of them is in a span or in `left_out`, by cause.
    """

    keys: list[str]
    spans: NDArray[np.int64]
    headers: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    stamp: tuple[int, int] = (0, 0)
    defect: str | None = None
    members: int = 0
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def truncated(self) -> bool:
        """The tar has no end mark."""
        return self.defect == TRUNCATED


def unreadable(defect: str) -> ShardIndex:
    """Return the index of a tar that cannot be read."""
    return _index([], [], defect=defect)


def status_stamp(status: os.stat_result) -> tuple[int, int]:
    """Return size and modification time (ns), which change when a file is written."""
    return status.st_size, status.st_mtime_ns


def scan(path: str) -> ShardIndex:
    """Scan a tar by its headers. If it is cut short, the samples before the cut are found, with a `defect`."""
    with open(path, "rb") as file:
        return scan_file(file, status_stamp(os.fstat(file.fileno())))


def scan_file(file: IO[bytes], stamp: tuple[int, int]) -> ShardIndex:
    """Scan an open tar, as `scan`; `stamp` is that of its index, and begins with its size."""
    begin = file.read(len(max(COMPRESSED, key=len)))
    packed = next((name for magic, name in COMPRESSED.items() if begin.startswith(magic)), None)
    if packed:
        return _index([], [], stamp, f"{packed}-compressed tar")
    file.seek(0)
    headers = _Headers(file, stamp[0])
    members = headers.members()
    samples, last, left_out = _samples(members, stamp[0])
    left_out += headers.left_out
    defect = headers.defect()
    keys, rows = list(samples), list(samples.values())
    if defect and len(keys) > 0 and last == keys[-1] and not headers.whole:
        # A last sample with other members than the one before it was cut in the middle.
        present = [[one != ABSENT for one in row] for row in rows[-2:]]
        if len(keys) == 1 or present[-1] != present[-2]:
            left_out[CUT] += sum(present[-1])
            keys, rows = keys[:-1], rows[:-1]
    return _index(keys, rows, stamp, defect, len(members) + headers.left_out.total(), dict(left_out))


Place = tuple[int, int]  # offset, size
Member = tuple[str, Place, Place]  # name, place of its content, place of its header


class _Headers:
    """Read the headers of a tar up to a damaged one. `left_out` counts the members that have no bytes to read."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size, self._end = file, size, 0
        self.whole = False
        self.left_out: Counter[str] = Counter()
        self.number = 0

    def members(self) -> list[Member]:
        """Return the file members in order; a link has the place of its target, which may come before or after it."""
        places: dict[str, Place] = {}
        found: list[tuple[str, Place | None, str, Place]] = []
        for name, place, target, header in self._read():
            place = place or places.get(target)
            if place:
                places[normpath(name)] = place
            found.append((name, place, target, header))
        waiting = {normpath(name): target for name, place, target, _ in found if not place}
        for _ in range(LONGEST_CHAIN):
            late = {name: places[target] for name, target in waiting.items() if name not in places and target in places}
            if not late:
                break
            places |= late
        resolved = [(name, place or places.get(target), header) for name, place, target, header in found]
        if lost := sum(place is None for _, place, _ in resolved):
            self.left_out[NO_TARGET] += lost
        return [(name, place, header) for name, place, header in resolved if place]

    def _read(self) -> Iterator[tuple[str, Place | None, str, Place]]:
        """Yield each file's name and place, or each link's name and target, and the place of its header."""
        try:
            bounded: Any = _Bounded(self._file)
            with tarfile.open(fileobj=bounded, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
                for self.number, member in enumerate(tar, 1):
                    if self.number % 1000 == 0:
                        beat()
                    if member.size < 0:
                        return
                    self._end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                    header = member.offset, member.offset_data - member.offset
                    if member.islnk():
                        yield member.name, None, normpath(member.linkname), header
                    elif member.issym():
                        yield member.name, None, normpath(join(dirname(member.name), member.linkname)), header
                    elif member.issparse():
                        self.left_out[SPARSE] += 1
                    elif member.isfile():
                        yield member.name, (member.offset_data, member.size), "", header
                    elif not member.isdir():
                        self.left_out[NO_FILE] += 1
        except OSError:
            raise
        except Exception:  # tarfile raises almost anything for corrupt bytes
            return
        self._file.seek(self._end)
        # tarfile reads a damaged header as the end of the tar, but only a block of zeros is the end.
        self.whole = self._file.read(BLOCK) == bytes(BLOCK)

    def defect(self) -> str | None:
        """Return the fault of the tar, or None. Call it after `members`."""
        if not self.whole:
            return TRUNCATED if self.number or not self._size else "not a tar"
        return "data behind the end of the tar" if any(self._file.read(BEHIND)) else None


class _Bounded:
    """Limit the reads of tarfile: forward only, and at most LONGEST_HEADER bytes, for any content of a header."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._furthest = file, 0
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        """Read `size` bytes; raise ReadError beyond LONGEST_HEADER."""
        if not 0 <= size <= LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)

    def seek(self, place: int) -> int:
        """Move forward; raise ReadError for a move back."""
        if place <= self._furthest:
            raise tarfile.ReadError("a member of negative size")
        self._furthest = place
        return self._file.seek(place)


Row = list[tuple[Place, Place]]  # of each kind: its content, its header
ABSENT = ((0, -1), (0, -1))


def _samples(members: list[Member], end: int) -> tuple[dict[str, Row], str | None, Counter[str]]:
    """Return members by key, the key of the last one that is used, and the number of those left out, by cause."""
    left_out: Counter[str] = Counter()
    plain = {_key(name)[0] for name, _, _ in members if _key(name)[1].lower() in KINDS}
    samples: dict[str, Row] = {}
    last = None
    for name, place, header in members:
        key, extension = _key(name)
        if key.rpartition("/")[2] == "":
            left_out[HIDDEN] += 1
            continue
        if extension.lower() not in KINDS and key not in plain:
            beginning, _, extension = extension.rpartition(".")
            key = f"{key}.{beginning}"
        kind = KINDS.get(extension.lower())
        if kind is None:
            left_out[OTHER_KIND] += 1
            continue
        last = key
        row = samples.setdefault(key, [ABSENT] * NUM_KINDS)
        if sum(place) > end:
            left_out[CUT] += 1
        elif row[kind] != ABSENT:
            left_out[TWICE] += 1
        else:
            row[kind] = place, header
    return samples, last, left_out


def _key(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot after its folders: (key, extension)."""
    folder, slash, name = name.rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}{slash}{stem}", extension


def digest(key: str) -> bytes:
    """Return the hash of a key, 8 bytes; the last four are kept in an index, as a little-endian number."""
    return blake2b(key.encode(), digest_size=8).digest()


def printable(name: str) -> str:
    """Return a member's name with escapes for line breaks and for bytes that are no UTF-8."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)


def _index(
    keys: list[str],
    rows: list[Row],
    stamp: tuple[int, int] = (0, 0),
    defect: str | None = None,
    members: int = 0,
    left_out: dict[str, int] | None = None,
) -> ShardIndex:
    keys = [printable(key) for key in keys]
    places = np.array(rows, np.int64).reshape(-1, NUM_KINDS, 2, 2)
    digests = b"".join(map(digest, keys))
    hashes = np.frombuffer(digests, "<u8")
    return ShardIndex(keys, places[:, :, 0], places[:, :, 1], hashes, stamp, defect, members, left_out or {})
