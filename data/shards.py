"""WebDataset tars, as img2dataset writes them, read at random access through a small index beside each tar."""

import hashlib
import json
import logging
import os
import tarfile
import uuid
import zipfile
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data import fields
from data.ledger import Ledger
from data.objectives.base import Skip
from data.shard_paths import SPLITS, shard_paths
from errors import ConfigurationError
from progress import beat

__all__ = ["SPLITS", "Record", "ShardSource", "SourceFacts", "index", "scan", "shard_paths"]

logger = logging.getLogger(__name__)

INDEX_VERSION = 1
# The members of a sample that are read; columns of the index in this order.
KINDS = {"json": 0, "txt": 1, "jpg": 2, "jpeg": 2, "png": 2, "webp": 2}
NUM_KINDS = 3
BLOCK = tarfile.BLOCKSIZE


class Record(NamedTuple):
    """A sample: its JSON as `fields` (schema in data/README.md), its encoded image if it has one."""

    key: str
    shard: str
    fields: dict[str, Any]
    image: bytes | None


@dataclass(frozen=True)
class ShardIndex:
    """What a tar holds. spans: int64 [samples, NUM_KINDS, 2], offset and size in bytes, size -1 where absent."""

    keys: list[str]
    spans: NDArray[np.int64]
    truncated: bool


@dataclass(frozen=True)
class SourceFacts:
    """What the records of a (source, split) are, in numbers that are equal wherever the same shards lie.

    `fingerprint`: SHA-256 over every shard's name, size, number of samples and members' offsets. It changes when a
    shard is added, removed, renamed or written anew, not when the corpus is copied or its modification times change.
    """

    records: int
    shards: int
    fingerprint: str


def scan(path: str) -> ShardIndex:
    """Reads a tar's headers. A tar that is cut short gives the samples before the cut, with `truncated` set."""
    keys: list[str] = []
    rows: list[list[list[int]]] = []
    size = os.path.getsize(path)
    end = 0
    whole = False
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                kind = KINDS.get(extension.lower())
                if not member.isfile() or kind is None:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if not keys or keys[-1] != key:
                    keys.append(key)
                    rows.append([[0, -1] for _ in range(NUM_KINDS)])
                if member.offset_data + member.size <= size:
                    rows[-1][kind] = [member.offset_data, member.size]
        with open(path, "rb") as file:
            # tarfile takes a damaged header for the end: only a block of zeros is the end.
            file.seek(end)
            whole = file.read(BLOCK) == bytes(BLOCK)
    except tarfile.TarError:
        pass
    spans = np.array(rows, np.int64).reshape(-1, NUM_KINDS, 2)
    if not whole and keys:
        # The last sample may lack members that its neighbours have; if so, the cut went through it.
        present = spans[:, :, 1] >= 0
        if len(keys) == 1 or not np.array_equal(present[-1], present[-2]):
            keys, spans = keys[:-1], spans[:-1]
    return ShardIndex(keys, spans, not whole)


def index(path: str) -> ShardIndex:
    """The tar's index, from `<tar>.index.npz` if that was made of the tar as it is, else made, and left there."""
    beside = f"{path}.index.npz"
    status = os.stat(path)
    stamp = np.array([INDEX_VERSION, status.st_size, status.st_mtime_ns], np.int64)
    try:
        with np.load(beside, allow_pickle=False) as stored:
            if np.array_equal(stored["stamp"], stamp):
                keys = bytes(stored["keys"]).decode().split("\n") if len(stored["spans"]) else []
                return ShardIndex(keys, stored["spans"], bool(stored["truncated"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # Missing, or not an index of ours: made anew.
    beat(f"indexing {path}")
    made = scan(path)
    keys_bytes = np.frombuffer("\n".join(made.keys).encode(), np.uint8)
    unfinished = f"{beside}.{uuid.uuid4().hex}.npz"  # many machines may index one tar at once
    try:
        np.savez(unfinished, stamp=stamp, keys=keys_bytes, spans=made.spans, truncated=np.bool_(made.truncated))
        os.replace(unfinished, beside)
    except OSError as error:
        logger.warning("the index of %s could not be kept (%s): it is made again at every start", path, error)
    return made


class ShardSource:
    """Random access to all records of a (source, split): a Grain RandomAccessDataSource.

    Opening it reads the indices alone; `facts` are what was found. Every truncated tar is one defect in `ledger`.
    """

    def __init__(self, name: str, location: str, split: str, ledger: Ledger):
        self.name = name
        self.paths = shard_paths(location, split)
        indices = [index(path) for path in self.paths]
        self._keys = [shard.keys for shard in indices]
        self._spans = [shard.spans for shard in indices]
        self._ends = np.cumsum([len(keys) for keys in self._keys])
        self.facts = SourceFacts(len(self), len(self.paths), _fingerprint(self.paths, indices))
        if not len(self):
            raise ConfigurationError(
                f"the {split} shards of source {name} at {location} hold no sample: check the tars."
            )
        for path, shard in zip(self.paths, indices, strict=True):
            ledger.count_shard(name, path, "truncated tar" if shard.truncated else None)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def shard(self, number: int) -> str:
        """The path of the tar that holds record `number`."""
        return self.paths[int(np.searchsorted(self._ends, number, side="right"))]

    def key(self, number: int) -> str:
        """The key of record `number`, which needs no read."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return self._keys[shard][int(number) - (int(self._ends[shard - 1]) if shard else 0)]

    def __getitem__(self, number: int) -> Record:
        """Record `number`; raises Skip (a defect) if it cannot be read."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        within = int(number) - (int(self._ends[shard - 1]) if shard else 0)
        path = self.paths[shard]
        try:
            with open(path, "rb") as file:
                members = [_read(file, int(offset), int(size)) for offset, size in self._spans[shard][within]]
        except OSError as error:
            raise Skip("unreadable shard", defect=True) from error
        json_bytes, text_bytes, image = members
        return Record(self._keys[shard][within], path, fields.parse(json_bytes, text_bytes), image)


def _fingerprint(paths: list[str], indices: list[ShardIndex]) -> str:
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    total = hashlib.sha256()
    for path, shard in zip(paths, indices, strict=True):
        name = os.path.relpath(path, folder)
        total.update(json.dumps([name, os.path.getsize(path), len(shard.keys)]).encode())
        total.update(shard.spans.astype("<i8").tobytes())
    return total.hexdigest()


def _read(file: Any, offset: int, size: int) -> bytes | None:
    if size < 0:
        return None
    file.seek(offset)
    content: bytes = file.read(size)
    if len(content) < size:
        raise OSError("the shard is shorter than its index says")
    return content
