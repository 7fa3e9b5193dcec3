"""Keep what tars hold in one file per source, which is mapped into memory and not read.

    64 bytes    MAGIC, version, place and length of the header, its CRC-32, length of the file
    columns     by record: see COLUMNS; 20 bytes each
    counts      by objective and block of BLOCK records: how many records and items come before the block
    scattered   members of the samples whose members do not lie side by side: 64 bytes each
    ends        by shard: how many records come before its end;  stamps: size and modification time of the tar
    header      JSON: names of the shards, their defects, profiles of the records, CRC-32 of every section

Keys are not kept: they are read from the headers of the tar. Opening reads the header alone.
"""

import hashlib
import json
import mmap
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from common.progress import beat
from data import objectives
from data.shards.contents import weights
from data.shards.selection import BLOCK, counts_before

MAGIC, VERSION = b"PaLI shard index", 3
PREAMBLE = struct.Struct("<16sIQQIQ")
PREAMBLE_SIZE, ALIGNED = 64, 64
COLUMNS = {
    "hashes": ("<u4", 1),  # the first 32 bits of the key's hash
    "profiles": ("<u4", 1),  # number of the record's profile (`data.shards.contents`)
    "image_sizes": ("<u2", 2),  # width and height, 0 without an image
    "begins": ("<u4", 1),  # blocks of 512 bytes before the sample; of a scattered one, its row of `scattered`
    "lengths": ("<u4", 1),  # pattern << 24 | blocks of the sample
}
SCATTERED_COLUMNS = 8  # offset and size of each kind of member, then offset and size of a header that has the key
MOST_PROFILES = 1 << 20


class NoIndex(Exception):
    """Raised where a file is no index, is damaged, or is of another version."""


@dataclass(frozen=True)
class Columns:
    """Hold the records of one tar as the index keeps them; `profiles` are numbers of `names_of_profiles`."""

    hashes: NDArray[np.uint32]
    profiles: NDArray[np.uint32]
    image_sizes: NDArray[np.uint16]
    begins: NDArray[np.uint32]
    lengths: NDArray[np.uint32]
    scattered: NDArray[np.int64]
    profile_names: list[str]
    stamp: tuple[int, int] = (0, 0)
    defect: str | None = None
    members: int = 0
    left_out: dict[str, int] = field(default_factory=dict)

    def holds_the_same(self, other: Self) -> bool:
        """Return whether both have the same keys at the same places, whatever their stamps."""
        names = ("hashes", "begins", "lengths", "scattered")
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)


@dataclass(frozen=True)
class Shard:
    """Hold the facts of one tar as a whole."""

    stamp: tuple[int, int]
    defect: str | None
    members: int
    left_out: dict[str, int]


class SourceIndex:
    """Read the index of a source. Its columns lie in the file, and cost no memory of the process."""

    def __init__(self, path: str) -> None:
        """Open and check the header; raise NoIndex, or OSError as `open` does."""
        with open(path, "rb") as file:
            self._read(path, file.fileno(), file.read(PREAMBLE_SIZE))

    @classmethod
    def from_file(cls, file: Any) -> Self:
        """Open an index in a file without a name."""
        made = cls.__new__(cls)
        file.seek(0)
        made._read("", file.fileno(), file.read(PREAMBLE_SIZE))
        return made

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def shard_number(self, number: int) -> int:
        """Return the number of the shard that holds a record."""
        return int(np.searchsorted(self.ends, number, side="right"))

    def first(self, shard: int) -> int:
        """Return the number of the first record of a shard."""
        return int(self.ends[shard - 1]) if shard else 0

    def columns(self, shard: int) -> Columns:
        """Return what is kept of one tar."""
        rows = slice(self.first(shard), int(self.ends[shard]))
        found: dict[str, Any] = {name: np.array(self.sections[name][rows]) for name in COLUMNS}
        scattered = found["lengths"] >> 24 == 0xFF
        own = self.scattered[found["begins"][scattered]]
        found["begins"][scattered] = np.arange(len(own))
        used, found["profiles"] = np.unique(found["profiles"], return_inverse=True)
        found["profiles"] = found["profiles"].astype(np.uint32)
        names = [self.profiles[number] for number in used.tolist()]
        return Columns(**found, scattered=own, profile_names=names, **vars(self.shards[shard]))

    def counts(self, objective: str, items: bool) -> NDArray[np.int64] | None:
        """Return the kept counts of an objective without options, None for one that the index was made before."""
        kept = self.header["objectives"]
        if kept.get(objective) != objectives.FIELDS[objective]:
            return None
        row: NDArray[np.int64] = self.sections["counts"][2 * list(kept).index(objective) + items]
        return row

    def verify(self) -> list[str]:
        """Return the sections whose bytes are not as they were written; reads the whole file."""
        return [name for name, one in self.sections.items() if _crc(one) != self.header["sections"][name]["crc"]]

    def _read(self, path: str, descriptor: int, preamble: bytes) -> None:
        self.path, size = path, os.fstat(descriptor).st_size
        if len(preamble) < PREAMBLE_SIZE or preamble[:16] != MAGIC:
            raise NoIndex("it is no index")
        _, version, place, length, crc, whole = PREAMBLE.unpack(preamble[: PREAMBLE.size])
        if version != VERSION:
            raise NoIndex(f"it is of version {version}")
        if whole != size or place + length > size:
            raise NoIndex("it is cut short")
        mapped = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)  # records are drawn in random order -> reading ahead is in vain
        content = mapped[place : place + length]
        if zlib.crc32(content) != crc:
            raise NoIndex("its header is damaged")
        self.header: dict[str, Any] = json.loads(content)
        self.sections: dict[str, NDArray[Any]] = {
            name: np.frombuffer(mapped, one["dtype"], int(np.prod(one["shape"])), one["place"]).reshape(one["shape"])
            for name, one in self.header["sections"].items()
        }
        self.ends, self.scattered = self.sections["ends"], self.sections["scattered"]
        self.names: list[str] = self.header["names"]
        self.profiles: list[str] = self.header["profiles"]
        self.fingerprint: str = self.header["fingerprint"]
        self.members: int = self.header["members"]
        self.left_out: Counter[str] = Counter(self.header["left_out"])
        self.field_map: dict[str, Any] = self.header["fields"]
        self.notes: dict[int, dict[str, Any]] = {int(number): note for number, note in self.header["notes"].items()}
        self.shards = _Shards(self)
        if len(self.ends) != len(self.names):
            raise NoIndex("its shards do not add up")


class _Shards(Sequence[Shard]):
    """The facts of the tars, made when one is read: most have no note."""

    def __init__(self, index: SourceIndex) -> None:
        self._index = index

    def __len__(self) -> int:
        return len(self._index.names)

    def __getitem__(self, number: Any) -> Any:
        if number >= len(self):
            raise IndexError(number)
        size, changed = self._index.sections["stamps"][number].tolist()
        note = self._index.notes.get(number, {})
        members = int(self._index.sections["members"][number])
        return Shard((size, changed), note.get("defect"), members, note.get("left_out", {}))


def write_index(
    path: str, names: Sequence[str], parts: Sequence[Callable[[], Columns]], field_map: Mapping[str, Any]
) -> None:
    """Write the index of a source, whose tars have these names and give these columns; raise OSError.

    Each of `parts` is called twice, so that no more than one tar's columns are in memory.
    """
    sizes, scattered = [], []
    for part in parts:
        beat()
        one = part()
        sizes.append(len(one.hashes))
        scattered.append(len(one.scattered))
    writer = _Writer(path, sum(sizes), sum(scattered), len(names))
    try:
        for number, part in enumerate(parts):
            beat()
            writer.add(number, names[number], part())
        writer.finish(names, field_map)
    finally:
        writer.file.close()


class _Writer:
    """Write the columns of one tar after another, then the rest."""

    def __init__(self, path: str, records: int, scattered: int, shards: int) -> None:
        num_blocks = -(-records // BLOCK) + 1
        shapes: dict[str, tuple[str, list[int]]] = {
            name: (kind, [records] if width == 1 else [records, width]) for name, (kind, width) in COLUMNS.items()
        }
        shapes["counts"] = "<i8", [2 * len(objectives.NAMES), num_blocks]
        shapes["scattered"] = "<i8", [scattered, SCATTERED_COLUMNS]
        shapes |= {"ends": ("<i8", [shards]), "stamps": ("<i8", [shards, 2]), "members": ("<i8", [shards])}
        self.layout: dict[str, dict[str, Any]] = {}
        place = PREAMBLE_SIZE
        for name, (kind, shape) in shapes.items():
            self.layout[name] = {"dtype": kind, "shape": shape, "place": place}
            length = int(np.prod(shape)) * np.dtype(kind).itemsize
            place += -(-length // ALIGNED) * ALIGNED
        self.end = place
        self.file = open(path, "w+b")  # noqa: SIM115 (closed by the caller)
        self.file.truncate(place)
        os.posix_fallocate(self.file.fileno(), 0, place)  # a full disk is an error here; in a mapping it is a signal
        mapped = mmap.mmap(self.file.fileno(), place)
        self.sections: dict[str, NDArray[Any]] = {
            name: np.frombuffer(mapped, one["dtype"], int(np.prod(one["shape"])), one["place"]).reshape(one["shape"])
            for name, one in self.layout.items()
        }
        self.records = self.scattered = 0
        self.profiles: dict[str, int] = {}
        self.notes: dict[int, dict[str, Any]] = {}
        self.left_out: Counter[str] = Counter()
        self.fingerprint = hashlib.sha256()

    def add(self, number: int, name: str, part: Columns) -> None:
        """Append the records of a tar."""
        rows = slice(self.records, self.records + len(part.hashes))
        numbers = np.array([self._profile(each) for each in part.profile_names], np.uint32)
        begins = part.begins.copy()
        begins[part.lengths >> 24 == 0xFF] += self.scattered
        for kind in COLUMNS:
            self.sections[kind][rows] = getattr(part, kind)
        self.sections["begins"][rows] = begins
        self.sections["profiles"][rows] = numbers[part.profiles] if len(numbers) else 0
        self.sections["scattered"][self.scattered : self.scattered + len(part.scattered)] = part.scattered
        self.records, self.scattered = rows.stop, self.scattered + len(part.scattered)
        self.sections["ends"][number], self.sections["stamps"][number] = self.records, part.stamp
        self.sections["members"][number] = part.members
        if part.defect or part.left_out:
            self.notes[number] = {"defect": part.defect, "left_out": part.left_out}
            self.left_out.update(part.left_out)
        self.fingerprint.update(json.dumps([name, part.stamp[0], len(part.hashes)]).encode())
        for column in (part.begins, part.lengths, part.scattered):
            self.fingerprint.update(np.ascontiguousarray(column).tobytes())

    def finish(self, names: Sequence[str], field_map: Mapping[str, Any]) -> None:
        """Write the counts, the header and, when all else is written, the preamble."""
        profiles = list(self.profiles)
        for number, objective in enumerate(objectives.NAMES):
            for items in (False, True):
                table = weights(profiles, objective, _every, items)
                self.sections["counts"][2 * number + items] = counts_before(self.sections["profiles"], table)
        for name, one in self.layout.items():
            one["crc"] = _crc(self.sections[name])
        header = {
            "names": list(names),
            "profiles": profiles,
            "fields": dict(field_map),
            "objectives": {name: objectives.FIELDS[name] for name in objectives.NAMES},
            "members": int(self.sections["members"].sum()),
            "left_out": self.left_out,
            "notes": self.notes,
            "fingerprint": self.fingerprint.hexdigest(),
            "sections": self.layout,
        }
        content = json.dumps(header).encode()
        self.sections.clear()
        self.file.seek(self.end)
        self.file.write(content)
        whole = self.end + len(content)
        self.file.seek(0)
        self.file.write(PREAMBLE.pack(MAGIC, VERSION, self.end, len(content), zlib.crc32(content), whole))
        self.file.flush()

    def _profile(self, name: str) -> int:
        if name not in self.profiles and len(self.profiles) >= MOST_PROFILES:
            name = _general(name)
        return self.profiles.setdefault(name, len(self.profiles))


def _general(profile: str) -> str:
    """Return a profile without languages: the fields alone, which few other records do not share."""
    return " ".join(f"{part.partition('=')[0]}=*" for part in profile.split(" ") if "=" in part)


def _every(code: str) -> bool:
    return True


def _crc(section: NDArray[Any]) -> int:
    content, crc = memoryview(section.reshape(-1).view(np.uint8).data), 0
    for start in range(0, len(content), 1 << 26):
        beat()
        crc = zlib.crc32(content[start : start + (1 << 26)], crc)
    return crc


def index_path(location: str, folder: str, split: str, index_folder: str | None) -> Path:
    """Return the file that the index of a split of a source is kept in: in `folder`, that of its tars, or elsewhere.

    `location`: the folder or pattern of the source.
    """
    if "://" in location:
        spelled = location.rstrip("/")
    else:
        spelled = os.path.abspath(location) if index_folder else os.path.relpath(location, folder)
    digest = hashlib.blake2b(os.fsencode(spelled), digest_size=4).hexdigest()
    if index_folder is not None:
        name = os.path.basename(folder.rstrip("/"))[:50]
        return Path(index_folder, f"{name}-{split}-{digest}.index")
    return Path(folder, f"{split}.index" if spelled == "." else f"{split}-{digest}.index")
