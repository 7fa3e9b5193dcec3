"""Read WebDataset tars, as img2dataset writes them, at random access through a small index of each tar."""

import hashlib
import json
import logging
import os
import threading
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import IO, Any, NamedTuple

import numpy as np

from common.errors import ConfigurationError, Notice
from common.launcher import is_main_rank
from data import fields
from data.error_budget import Ledger
from data.shards.index import CUT, DEFECTS, Indices, ShardIndex, index, scan, stamp_of, unreadable
from data.shards.paths import SPLITS, Part, parts, shard_paths
from data.skip import Skip
from data.storage import PATIENCE_S, retry, storage_failed

__all__ = ["SPLITS", "ReadOptions", "Record", "ShardSource", "SourceFacts", "index", "scan", "shard_paths"]

logger = logging.getLogger(__name__)

MIB = 1 << 20


class Record(NamedTuple):
    """Hold a sample: its JSON as `fields` (listed in docs/data.md), its encoded image if it has one."""

    key: str
    shard: str
    fields: dict[str, Any]
    image: bytes | None


@dataclass(frozen=True)
class SourceFacts:
    """Identify the records of a (source, split) by numbers that are equal for every copy of the same shards.

    `fingerprint`: SHA-256 over every shard's name, size, number of samples and members' offsets. It changes when a
    shard is added, removed, renamed or written anew, not when the corpus is copied or its modification times change.
    """

    records: int
    shards: int
    fingerprint: str


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading sources; each field is the setting of that name in `data` (data/config.py)."""

    retry_s: float = PATIENCE_S
    index_folder: str | None = None
    max_member_mib: int = 64
    holdout: float = 0.0


class ShardSource:
    """Give random access to all records of a (source, split): a Grain RandomAccessDataSource.

    The constructor reads the indices only; `facts` identifies the records. Every broken tar is one defect in `ledger`;
    `members` is the number of members of all tars, and `left_out` counts those that belong to no sample, by cause.
    """

    def __init__(
        self, name: str, location: str, split: str, ledger: Ledger, options: ReadOptions | None = None
    ) -> None:
        self.name, self.options = name, options or ReadOptions()
        paths, part = parts(location, split, self.options.holdout, self.options.retry_s)
        self.paths = _distinct(paths)
        if len(self.paths) < len(paths):
            ledger.count_left_out(name, "shard that is a link to another one", len(paths) - len(self.paths))
        opened = self._open()
        self.members = sum(shard.members for shard in opened)
        self.left_out: Counter[str] = Counter()
        for shard in opened:
            self.left_out.update(shard.left_out)
        self._indices = [_of_part(shard, part) for shard in opened]
        self._ends = np.cumsum([len(shard.keys) for shard in self._indices])
        if not len(self):
            raise ConfigurationError(_nothing_in(name, location, split, opened, part))
        self.facts = SourceFacts(len(self), len(self.paths), _fingerprint(self.paths, self._indices))
        self._part, self._lock = part, threading.Lock()
        self._judged: dict[tuple[int, tuple[int, int]], bool] = {}
        self._count(ledger, opened)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def shard(self, number: int) -> str:
        """Return the path of the tar that holds record `number`."""
        return self.paths[int(np.searchsorted(self._ends, number, side="right"))]

    def key(self, number: int) -> str:
        """Return the key of record `number`, without reading the record."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return self._indices[shard].keys[int(number) - (int(self._ends[shard - 1]) if shard else 0)]

    def __getitem__(self, number: int) -> Record:
        """Read record `number`; raise Skip (a defect) if it is unreadable, StorageFailed if the storage fails."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        within = int(number) - (int(self._ends[shard - 1]) if shard else 0)
        path = self.paths[shard]
        try:
            members = retry(lambda: self._read(shard, within), path, self.options.retry_s, was_there=True)
        except PermissionError as error:  # it was readable when it was opened
            raise storage_failed(error, path) from error
        except OSError as error:
            raise Skip("unreadable shard", defect=True) from error
        json_bytes, text_bytes, image = members
        return Record(self._indices[shard].keys[within], path, fields.parse(json_bytes, text_bytes), image)

    def _open(self) -> list[ShardIndex]:
        indices, opened = Indices(self.options.index_folder, self.options.retry_s), []
        for path in self.paths:
            try:
                opened.append(indices.of(path))
            except OSError as error:  # a dangling link, a folder, a shard that has vanished
                logger.warning("%s: %s", path, error.strerror or error)
                opened.append(unreadable("unreadable shard"))
        if indices.unkept is not None and is_main_rank():
            warnings.warn(
                f"source {self.name}: indices of its shards cannot be kept ({indices.unkept.strerror}) and are made "
                "again at every start; set data.index_folder to a folder that can be written to.",
                Notice,
                stacklevel=2,
            )
        return opened

    def _count(self, ledger: Ledger, opened: Sequence[ShardIndex]) -> None:
        for path, shard in zip(self.paths, opened, strict=True):
            ledger.count_shard(self.name, path, shard.defect)
        for cause, number in self.left_out.items():
            if cause != CUT:  # a truncated tar is one defect
                ledger.count_left_out(self.name, cause, number)
        lost = {
            (path, cause): shard.left_out[cause]
            for path, shard in zip(self.paths, opened, strict=True)
            for cause in DEFECTS
            if cause in shard.left_out
        }
        ledger.check_left_out(self.name, lost, self.members)

    def _read(self, shard: int, within: int) -> list[bytes | None]:
        """Return the members of a record, in the order of KINDS."""
        spans = self._indices[shard].spans[within].tolist()
        if max(size for _, size in spans) > self.options.max_member_mib * MIB:
            raise Skip(f"member of more than data.max_member_mib={self.options.max_member_mib}", defect=True)
        with open(self.paths[shard], "rb") as file:
            stamp = stamp_of(os.fstat(file.fileno()))
            if stamp != self._indices[shard].stamp and not self._holds_the_same(shard, stamp):
                raise Skip("changed shard", defect=True)
            return [_read_span(file, offset, size) for offset, size in spans]

    def _holds_the_same(self, shard: int, stamp: tuple[int, int]) -> bool:
        """Return whether a tar with a new stamp has its members at the same places: it was copied or touched."""
        with self._lock:
            if (shard, stamp) not in self._judged:
                found = _of_part(scan(self.paths[shard]), self._part)
                self._judged[shard, stamp] = found.holds_the_same(self._indices[shard])
            return self._judged[shard, stamp]


def _distinct(paths: Sequence[str]) -> list[str]:
    """Return the paths without repeats of a file through a link, of the file or of its folder."""
    folders: dict[str, str] = {}
    files: dict[str, str] = {}
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        real = os.path.join(folders[folder], name)
        files.setdefault(os.path.realpath(path) if os.path.islink(path) else real, path)
    return list(files.values())


def _of_part(shard: ShardIndex, part: Part) -> ShardIndex:
    """Return the samples of a shard that belong to a part; the hashes are dropped, because nothing needs them."""
    own = replace(shard, hashes=shard.hashes[:0])
    if part == Part():
        return own
    fractions = (shard.hashes >> np.uint64(11)) * 2.0**-53
    kept = np.flatnonzero((fractions >= part.first) & (fractions < part.last))
    return replace(own, keys=[shard.keys[number] for number in kept], spans=shard.spans[kept])


def _nothing_in(name: str, location: str, split: str, opened: Sequence[ShardIndex], part: Part) -> str:
    number = sum(len(shard.keys) for shard in opened)
    if number:
        share = part.first or part.last
        return (
            f"data.holdout={share:g} leaves no {split} record of the {number:,} of source {name}: change it, or set it "
            "to 0 and evaluation.every_steps=0."
        )
    defects = Counter(shard.defect for shard in opened if shard.defect)
    causes = f" ({', '.join(f'{count} x {cause}' for cause, count in defects.most_common())})" if defects else ""
    return f"the {split} shards of source {name} at {location} hold no sample{causes}: check the tars."


def _fingerprint(paths: Sequence[str], indices: Sequence[ShardIndex]) -> str:
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    total = hashlib.sha256()
    for path, shard in zip(paths, indices, strict=True):
        name = os.path.relpath(path, folder)
        total.update(json.dumps([name, shard.stamp[0], len(shard.keys)]).encode())
        total.update(shard.spans.astype("<i8").tobytes())
    return total.hexdigest()


def _read_span(file: IO[bytes], offset: int, size: int) -> bytes | None:
    if size < 0:
        return None
    file.seek(offset)
    content = file.read(size)
    if len(content) < size:
        raise Skip("changed shard", defect=True)
    return content
