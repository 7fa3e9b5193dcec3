"""Read WebDataset tars, as img2dataset writes them, at random access through the index of their source."""

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from common.errors import ConfigurationError, StorageFailed
from data import fields
from data.error_budget import Ledger
from data.shards.build import UNREADABLE, Job, open_index
from data.shards.contents import weights
from data.shards.examine import places
from data.shards.files import Handles, Stamp
from data.shards.index import SourceIndex, index_path
from data.shards.paths import SPLITS, Part, parts, shard_paths
from data.shards.remote import GIB, Cache, is_url
from data.shards.sample import SCATTERED, Members, chosen, entries, key, read_without_image
from data.shards.scan import BLOCK, CUT, DEFECTS, IMAGE, NUM_KINDS, digest
from data.shards.selection import Selection
from data.skip import Skip
from data.storage import PATIENCE_S, retry, storage_failed

__all__ = ["SPLITS", "ReadOptions", "Record", "ShardSource", "SourceFacts", "shard_paths"]

MIB = 1 << 20
SMALL = 8192  # bytes of a sample that are read at once, with its image
ALL = (0, 1 << 32)  # of the hashes of keys
Uses = Callable[[str], bool]


class Record(NamedTuple):
    """Hold a sample: its JSON as `fields` (listed in docs/data.md), its encoded image if it has one.

    `image_at`: offset and size of the image in the tar, for `ShardSource.image`.
    """

    key: str
    shard: str
    fields: dict[str, Any]
    image: bytes | None
    image_at: tuple[int, int] | None = None


@dataclass(frozen=True)
class SourceFacts:
    """Identify the records of a (source, split) by numbers that are equal for every copy of the same shards.

    `fingerprint`: SHA-256 over every shard's name, size, number of samples and their places. It changes when a
    shard is added, removed, renamed or written anew, not when the corpus is copied or its modification times change.
    """

    records: int
    shards: int
    fingerprint: str


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading a source; each is the setting of that name in `data` (data/config.py), `fields` its own."""

    retry_s: float = PATIENCE_S
    index_folder: str | None = None
    max_member_mib: int = 64
    holdout: float = 0.0
    fields: Mapping[str, str] = field(default_factory=dict)
    cache_folder: str | None = None
    cache_gib: float = 10.0


class ShardSource:
    """Give random access to all records of a (source, split).

    The constructor reads the index only, or takes one that is open; `facts` identifies the records. Every broken tar is
    one defect in `ledger`; `members` is the number of members of all tars, and `left_out` counts those that belong to
    no sample, by cause.

    A record has two numbers: `source[n]` counts those of the split; `read`, `key` and `shard` take its number in the
    index, which `numbered(n)` gives. They are the same but where a share of the records is held out.
    """

    def __init__(
        self, name: str, location: str, split: str, ledger: Ledger, options: ReadOptions | None = None,
        index: SourceIndex | None = None,
    ) -> None:  # fmt: skip
        self.name, self.options = name, options or ReadOptions()
        paths, part = parts(location, split, self.options.holdout, self.options.retry_s)
        self.paths = distinct(paths)
        if len(self.paths) < len(paths):
            ledger.count_left_out(name, "shard that is a link to another one", len(paths) - len(self.paths))
        job = index_job(location, split, self.paths, part, self.options)
        self.index = open_index(job) if index is None else index
        self.members, self.left_out = self.index.members, self.index.left_out
        self._part = (round(part.first * ALL[1]), round(part.last * ALL[1]))
        self._own = None if self._part == ALL else self.selection(lambda profiles: np.ones(len(profiles), np.uint16))
        if not len(self):
            raise ConfigurationError(_nothing_in(name, location, split, self.index, part))
        self.facts = SourceFacts(len(self), len(self.paths), _fingerprint(self.index, self._part))
        self._lock, self._handles = threading.Lock(), Handles(_cache(self.options))
        self._judged: dict[tuple[int, Stamp], bool] = {}
        self._count(ledger)

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs to read the same records: it opens the index, and compares no tar."""
        kept = {name: value for name, value in vars(self).items() if name not in ("_own", "_lock", "_handles")}
        return kept | {"index": (self.index.path, self.index.fingerprint)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        path, fingerprint = state["index"]
        self.index = _opened_again(path, fingerprint, self.options.retry_s)
        self._own = None if self._part == ALL else self.selection(lambda profiles: np.ones(len(profiles), np.uint16))
        self._lock, self._handles = threading.Lock(), Handles(_cache(self.options))

    def __len__(self) -> int:
        return len(self.index) if self._own is None else len(self._own)

    def __getitem__(self, number: int) -> Record:
        """Read a record of the split; see `read`."""
        return self.read(self.numbered(number))

    def numbered(self, number: int) -> int:
        """Return the number in the index of a record of the split."""
        return int(number) if self._own is None else self._own[number][0]

    def selection(self, table: Callable[[list[str]], Any]) -> Selection:
        """Return the records of the split by a table of weights, one of each profile."""
        sections = self.index.sections
        return Selection(sections["profiles"], table(self.index.profiles), None, sections["hashes"], self._part)

    def usable(self, objective: str, uses: Uses | None, items: bool) -> Selection:
        """Return the records that have the field of an objective, in a language that it uses (None: any).

        With `items` a record comes once for each of its items, else once.
        """
        table = weights(self.index.profiles, objective, uses or (lambda code: True), items)
        kept = self.index.counts(objective, items) if uses is None else None
        sections = self.index.sections
        return Selection(sections["profiles"], table, kept, sections["hashes"], self._part)

    def shard(self, number: int) -> str:
        """Return the path of the tar that holds record `number` of the index."""
        return self.paths[self.index.shard_number(number)]

    def key(self, number: int) -> str:
        """Return the key of record `number` of the index, which is read from the tar; "" if that fails."""
        try:
            return self._sample(number).key
        except (Skip, OSError):
            return ""

    def read(self, number: int, image: bool = True, mapped: bool = True) -> Record:
        """Read record `number` of the index; raise Skip (a defect) if it is unreadable, StorageFailed if that fails.

        Without `image` its bytes are not read, and are b"" where the record has one. Without `mapped` the fields have
        the names of the JSON.
        """
        found = self._members(number, image)
        json_bytes, text_bytes, content = found.contents
        own = fields.parse(json_bytes, text_bytes, self.options.fields if mapped else None)
        return Record(found.key, self.shard(number), own, content, found.image_at)

    def image(self, number: int, at: tuple[int, int] | None = None) -> bytes | None:
        """Return the encoded image of a record, None where there is none; raise as `read`.

        `at`: its place, as `read` found it. While the tar has not changed, no other byte of the sample is read.
        """
        if at is not None and (content := self._bytes_at(number, at)) is not None:
            return content
        return self._members(number, True).contents[IMAGE]

    def _bytes_at(self, number: int, at: tuple[int, int]) -> bytes | None:
        """Return bytes of the tar of a record; None where it has changed or fails, so that `_members` decides."""
        shard = self.index.shard_number(number)
        try:
            handle = self._handles.get(self.paths[shard])
            same = handle.stamp() == tuple(self.index.sections["stamps"][shard].tolist())
            content = handle.read(*at) if same else b""
        except OSError:
            return None
        return content if same and len(content) == at[1] else None

    def _members(self, number: int, image: bool) -> Members:
        path = self.shard(number)
        try:
            return retry(lambda: self._sample(number, image), path, self.options.retry_s, was_there=True)
        except PermissionError as error:  # it was readable when it was opened
            raise storage_failed(error, path) from error
        except OSError as error:
            raise Skip(UNREADABLE, defect=True) from error

    def _sample(self, number: int, image: bool = True) -> Members:
        """Return the key and the members of a record; without `image`, b"" in its place."""
        shard = self.index.shard_number(number)
        path = self.paths[shard]
        try:
            handle = self._handles.get(path)
            stamp = handle.stamp()
            if stamp != tuple(self.index.sections["stamps"][shard].tolist()) and not self._holds_the_same(shard, stamp):
                raise Skip("changed shard", defect=True)
            begin, length = int(self.index.sections["begins"][number]), int(self.index.sections["lengths"][number])
            if length >> 24 == SCATTERED:
                found = self._scattered(handle.read, begin, image)
            else:
                size = (length & 0xFFFFFF) * BLOCK
                whole = image or size <= SMALL
                content = (handle.read if whole else partial(read_without_image, handle.read))(begin * BLOCK, size)
                found = chosen(content, length >> 24)
                if found is not None and found.image_at is not None:
                    found = found._replace(image_at=(begin * BLOCK + found.image_at[0], found.image_at[1]))
        except OSError:
            self._handles.forget(path)
            raise
        if found is None or int.from_bytes(digest(found.key)[4:], "little") != self.index.sections["hashes"][number]:
            self._handles.forget(path)
            raise Skip("changed shard", defect=True)
        self._check_sizes(len(one) for one in found.contents if one is not None)
        if not image and found.contents[IMAGE] is not None:
            found.contents[IMAGE] = b""
        return found

    def _scattered(self, read: Callable[[int, int], bytes], row: int, image: bool) -> Members | None:
        places_, header = np.split(self.index.scattered[row], [2 * NUM_KINDS])
        spans = places_.reshape(-1, 2).tolist()
        self._check_sizes(size for _, size in spans)
        if not image and spans[IMAGE][1] >= 0:
            spans[IMAGE] = [0, 0]
        contents = [read(offset, size) if size >= 0 else None for offset, size in spans]
        named = entries(read(*header.tolist()))
        whole = all(one is None or len(one) == size for one, (_, size) in zip(contents, spans, strict=True))
        return Members(key(named[0].name), contents) if named and whole else None

    def _check_sizes(self, sizes: Any) -> None:
        if max(sizes) > self.options.max_member_mib * MIB:
            raise Skip(f"member of more than data.max_member_mib={self.options.max_member_mib}", defect=True)

    def _holds_the_same(self, shard: int, stamp: Stamp) -> bool:
        """Return whether a tar with a new stamp has its members at the same places: it was copied or touched."""
        with self._lock:
            if (shard, stamp) not in self._judged:
                found = places(self.paths[shard])
                self._judged[shard, stamp] = found.holds_the_same(self.index.columns(shard))
            return self._judged[shard, stamp]

    def _count(self, ledger: Ledger) -> None:
        broken = {self.paths[number]: note["defect"] for number, note in self.index.notes.items() if note["defect"]}
        ledger.count_shards(self.name, len(self.paths) - len(broken), broken)
        lost = {
            (self.paths[number], cause): found
            for number, note in self.index.notes.items()
            for cause, found in note["left_out"].items()
            if cause in DEFECTS
        }
        for cause, found in self.left_out.items():
            if cause != CUT:  # a truncated tar is one defect
                ledger.count_left_out(self.name, cause, found)
        ledger.check_left_out(self.name, lost, self.members)


def _opened_again(path: str, fingerprint: str, retry_s: float) -> SourceIndex:
    """Open the index that another process has opened; raise StorageFailed where it is gone, or another one."""
    try:
        found = retry(lambda: SourceIndex(path), path, retry_s, was_there=True)
    except OSError as error:
        raise storage_failed(error, path) from error
    if found.fingerprint != fingerprint:
        raise StorageFailed(
            f"{path} was made anew while it was in use, for shards that have changed; start the same command again."
        )
    return found


def _cache(options: ReadOptions) -> Cache | None:
    return None if options.cache_folder is None else Cache(options.cache_folder, int(options.cache_gib * GIB))


def index_job(location: str, split: str, paths: Sequence[str], part: Part, options: ReadOptions) -> Job:
    """Return the job that makes the index of a split of a source; a part of a split has the index of the whole."""
    folder, names = _below_one_folder(paths)
    if is_url(folder) and options.index_folder is None:
        raise ConfigurationError(
            f"{location} is a URL, beside which no index can be kept; set data.index_folder to a folder for it."
        )
    if options.index_folder is not None:
        try:
            os.makedirs(options.index_folder, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"data.index_folder={options.index_folder} cannot be made ({error.strerror}): choose another folder."
            ) from error
    target = index_path(location, folder, split if part == Part() else "train", options.index_folder)
    return Job(folder, names, str(target), dict(options.fields), options.max_member_mib * MIB, options.retry_s)


def _below_one_folder(paths: Sequence[str]) -> tuple[str, list[str]]:
    """Return the deepest folder that all these files lie below, and their paths from there."""
    split = [_split(path) for path in paths]
    own = dict.fromkeys(folder for folder, _ in split)
    if is_url(paths[0]):
        protocol, _, _ = paths[0].partition("://")
        folders = {folder: "/" + folder.partition("://")[2] for folder in own}
    else:
        protocol, folders = "", {folder: os.path.abspath(folder) for folder in own}
    deepest = os.path.commonpath(folders.values())
    below = {folder: os.path.relpath(path, deepest) for folder, path in folders.items()}
    if protocol:
        absolute = paths[0].startswith(f"{protocol}:///")  # file:///data, against s3://bucket
        deepest = f"{protocol}://{'/' * absolute}{deepest[1:]}"
    return deepest, [name if below[folder] == "." else f"{below[folder]}/{name}" for folder, name in split]


def _split(path: str) -> tuple[str, str]:
    """Return the folder and the name of a tar, several times as fast as os.path.split."""
    folder, slash, name = path.rpartition("/")
    return folder or slash, name


def distinct(paths: Sequence[str]) -> list[str]:
    """Return the paths without repeats of a file through a link, of the file or of its folder."""
    folders: dict[str, str] = {}
    files: dict[str, str] = {}
    for path in paths:
        if is_url(path):
            files.setdefault(path, path)
            continue
        folder, name = _split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        real = f"{folders[folder]}/{name}"
        files.setdefault(os.path.realpath(path) if os.path.islink(path) else real, path)
    return list(files.values())


def _nothing_in(name: str, location: str, split: str, index: SourceIndex, part: Part) -> str:
    if len(index):
        share = part.first or part.last
        return (
            f"data.holdout={share:g} leaves no {split} record of the {len(index):,} of source {name}: change it, or "
            "set it to 0 and evaluation.every_steps=0."
        )
    defects = Counter(note["defect"] for note in index.notes.values() if note["defect"])
    causes = f" ({', '.join(f'{count} x {cause}' for cause, count in defects.most_common())})" if defects else ""
    return f"the {split} shards of source {name} at {location} hold no sample{causes}: check the tars."


def _fingerprint(index: SourceIndex, part: tuple[int, int]) -> str:
    if part == ALL:
        return index.fingerprint
    return hashlib.sha256(f"{index.fingerprint} {part}".encode()).hexdigest()
