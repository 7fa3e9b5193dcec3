"""Make the index of a source: examine its tars, in several processes, and join what they hold in one file.

A part of the index is kept for each tar until all are done, so that a build that is killed is continued. Of an index
that is there, only tars that are new or have changed are examined again.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from common.errors import ConfigurationError, Notice
from common.files import beside
from common.launcher import is_main_rank
from common.progress import beat
from data.shards import files
from data.shards.examine import examine, nothing
from data.shards.index import COLUMNS, Columns, NoIndex, SourceIndex, write_index
from data.storage import PATIENCE_S, not_permitted, retry

logger = logging.getLogger(__name__)

STAT_THREADS = 16
WORTH_A_PROCESS = 256 << 20  # bytes of tars; starting a process takes a second
UNREADABLE = "unreadable shard"


@dataclass(frozen=True)
class Job:
    """Name the tars of a source and its index.

    `names`: of the tars below `folder`. `target`: the file of the index. `max_member`: bytes of the largest member that
    is read. `retry_s`: see `data.config`.
    """

    folder: str
    names: list[str]
    target: str
    fields: dict[str, Any] = field(default_factory=dict)
    max_member: int = 64 << 20
    retry_s: float = PATIENCE_S

    @property
    def parts(self) -> Path:
        """Return the folder of the parts that are done."""
        return Path(f"{self.target}.parts")

    def path(self, number: int) -> str:
        """Return the path of a tar."""
        return os.path.join(self.folder, self.names[number])

    def stamps(self) -> list[files.Stamp | None]:
        """Return the stamps of all tars, None where one cannot be read."""
        beat(f"comparing {len(self.names):,} shards with {self.target}")
        every = range(len(self.names))
        with ThreadPoolExecutor(
            STAT_THREADS
        ) as pool:  # a task of each thread: one of each tar costs more than its stat
            found = pool.map(lambda first: [self._stamp(n) for n in every[first::STAT_THREADS]], range(STAT_THREADS))
            stamps: list[files.Stamp | None] = [None] * len(every)
            for first, own in enumerate(found):
                stamps[first::STAT_THREADS] = own
        return stamps

    def _stamp(self, number: int) -> files.Stamp | None:
        path = self.path(number)
        try:
            with suppress(OSError):
                return files.stamp(path)
            return retry(lambda: files.stamp(path), path, self.retry_s, was_there=True)
        except PermissionError as error:
            raise not_permitted(path) from error
        except OSError:
            return None


def open_index(job: Job, num_processes: int | None = None) -> SourceIndex:
    """Return the index of a source, made or completed where it lacks a tar or a tar has changed.

    One process makes it, others that want it wait. Raises StorageFailed, and ConfigurationError for a tar without
    permission to read. Where the index cannot be kept, it is made in a file that goes with the process.
    """
    stamps = job.stamps()
    found = _kept(job)
    if found is not None and _is_current(found, job, stamps):
        return found
    try:
        os.makedirs(job.parts, exist_ok=True)
        with _locked(job):
            found = _kept(job)
            if found is None or not _is_current(found, job, stamps):
                _build(job, stamps, found, num_processes)
                found = SourceIndex(job.target)
            shutil.rmtree(job.parts, ignore_errors=True)
        return found
    except OSError as error:
        return _unkept(job, stamps, error)


def build_share(job: Job, rank: int, size: int) -> None:
    """Examine each `size`-th tar, beginning with `rank`, that has no part yet and is not in the index that is kept."""
    old = _kept(job)
    kept = _current_names(old, job) if old is not None else {}
    for number in range(rank, len(job.names), size):
        stamp = job._stamp(number)
        if stamp is not None and kept.get(job.names[number]) != stamp and _part(job, number, stamp) is None:
            _examine(job, number)


def _build(job: Job, stamps: list[files.Stamp | None], old: SourceIndex | None, num_processes: int | None) -> None:
    kept = _current_names(old, job) if old is not None else {}
    missing = [n for n, stamp in enumerate(stamps) if stamp is not None and kept.get(job.names[n]) != stamp]
    missing = [number for number in missing if _part(job, number, stamps[number]) is None]
    if missing:
        _examine_all(job, missing, stamps, num_processes)
    numbers = {name: number for number, name in enumerate(old.names)} if old is not None else {}
    joined: list[Callable[[], Columns]] = []
    for number, stamp in enumerate(stamps):
        name = job.names[number]
        if stamp is not None and kept.get(name) == stamp and old is not None:
            joined.append(partial(old.columns, numbers[name]))
        else:
            joined.append(partial(_columns, job, number))
    beat(f"writing {job.target}")
    with beside(Path(job.target), durable=True) as partial_file:
        write_index(str(partial_file), job.names, joined, job.fields)


def _examine_all(job: Job, missing: list[int], stamps: list[files.Stamp | None], num_processes: int | None) -> None:
    """Examine these tars, in processes if they are worth it; what a process leaves undone is done here."""
    size = sum(stamp[0] for stamp in stamps if stamp is not None)
    cores = len(os.sched_getaffinity(0)) if num_processes is None else num_processes
    count = min(cores, len(missing), 1 + size // WORTH_A_PROCESS if num_processes is None else cores)
    if count > 1:
        with workers(job, count) as processes:
            _wait(job, processes, len(missing))
    for number in missing:
        stamp = stamps[number]
        if stamp is not None and _part(job, number, stamp) is None:
            _examine(job, number)


def build_together(job: Job, rank: int, size: int, num_processes: int, patience_s: float = 300.0) -> None:
    """Examine this rank's share of the tars, in processes; rank 0 then waits for the other shares.

    It waits until no tar was done for `patience_s`: then a rank has ended, and `open_index` examines its tars.
    """
    job.parts.mkdir(parents=True, exist_ok=True)
    if num_processes > 1:
        with workers(job, num_processes, rank, size) as processes:
            _wait(job, processes, len(job.names))
    build_share(job, rank, size)
    done, since = num_parts(job), time.monotonic()
    while rank == 0 and done < len(job.names) and time.monotonic() - since < patience_s:
        beat(f"waiting for other ranks, {done:,} of {len(job.names):,} shards")
        time.sleep(0.2)
        if (found := num_parts(job)) != done:
            done, since = found, time.monotonic()


@contextmanager
def workers(job: Job, count: int, rank: int = 0, size: int = 1) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start processes that examine the share of this rank of `size`; end them where an error is raised."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    processes = []
    try:
        for number in range(count):
            process = subprocess.Popen(
                [sys.executable, "-m", "data.shards.build", str(rank + number * size), str(size * count)],
                stdin=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            processes.append(process)
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it was killed; its share is done here
                process.stdin.write(json.dumps(asdict(job)).encode())
                process.stdin.close()
        yield processes
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def _wait(job: Job, processes: Sequence[subprocess.Popen[bytes]], total: int) -> None:
    began = time.monotonic()
    while any(process.poll() is None for process in processes):
        time.sleep(0.2)
        done = num_parts(job)
        rate = done / (time.monotonic() - began)
        beat(f"indexing {job.folder}, {done:,} of {total:,} shards, {rate:.1f} shards/s")
    if failed := [process.returncode for process in processes if process.returncode]:
        logger.warning("%d of %d processes that index %s ended early", len(failed), len(processes), job.folder)


def num_parts(job: Job) -> int:
    """Return how many tars are done."""
    try:
        with os.scandir(job.parts) as every:
            return sum(one.name.endswith(".npz") for one in every)
    except OSError:
        return 0


def _examine(job: Job, number: int) -> None:
    """Examine a tar and write its part; a tar that cannot be read has none."""
    path = job.path(number)
    beat(f"indexing {path}")
    try:
        found = retry(lambda: examine(path, job.fields, job.max_member), path, job.retry_s, was_there=True)
    except PermissionError as error:
        raise not_permitted(path) from error
    except OSError as error:  # a dangling link, a folder, a shard that has vanished
        logger.warning("%s: %s", path, error.strerror or error)
        return
    facts = {"stamp": found.stamp, "defect": found.defect, "members": found.members, "left_out": found.left_out}
    notes = json.dumps(facts | {"profiles": found.profile_names, "fields": job.fields}).encode()
    arrays = {name: getattr(found, name) for name in (*COLUMNS, "scattered")}
    job.parts.mkdir(parents=True, exist_ok=True)
    with beside(_part_path(job, number)) as partial_file, partial_file.open("wb") as file:
        np.savez(file, notes=np.frombuffer(notes, np.uint8), **arrays)


def _columns(job: Job, number: int) -> Columns:
    found = _part(job, number, None)  # if the tar has changed since, the next start finds that
    return nothing(UNREADABLE) if found is None else found


def _part(job: Job, number: int, stamp: files.Stamp | None) -> Columns | None:
    """Return the part of a tar, None where it is missing, damaged, or of a tar with another stamp."""
    try:
        with np.load(_part_path(job, number), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in (*COLUMNS, "scattered")}
            notes = json.loads(bytes(stored["notes"]))
        same = notes.pop("fields") == job.fields and (stamp is None or tuple(notes["stamp"]) == stamp)
        names, notes["stamp"] = notes.pop("profiles"), tuple(notes["stamp"])
        return Columns(**arrays, profile_names=names, **notes) if same else None
    except OSError:
        return None
    except Exception:  # damaged: numpy and zipfile raise almost anything
        return None


def _part_path(job: Job, number: int) -> Path:
    name = blake2b(os.fsencode(job.names[number]), digest_size=12).hexdigest()
    return job.parts / f"{name}.npz"


def _kept(job: Job) -> SourceIndex | None:
    try:
        found = retry(lambda: SourceIndex(job.target), job.target, job.retry_s)
    except (OSError, NoIndex, ValueError, KeyError, TypeError):
        return None
    return found if found.field_map == job.fields else None


def _current_names(index: SourceIndex, job: Job) -> dict[str, files.Stamp]:
    """Return the stamps that the index has of tars, by name."""
    stamps = index.sections["stamps"].tolist()
    return {name: (size, changed) for name, (size, changed) in zip(index.names, stamps, strict=True)}


def _is_current(index: SourceIndex, job: Job, stamps: list[files.Stamp | None]) -> bool:
    """Return whether an index is of these tars as they are now."""
    wanted = np.array([stamp or (0, 0) for stamp in stamps], np.int64).reshape(-1, 2)
    return index.names == job.names and np.array_equal(index.sections["stamps"], wanted)


@contextmanager
def _locked(job: Job) -> Iterator[None]:
    """Wait until no other process makes this index."""
    lock = FileLock(job.parts / "lock", timeout=0)
    while True:
        try:
            with lock:
                os.makedirs(job.parts, exist_ok=True)
                yield
            return
        except Timeout:
            beat(f"waiting for another process that makes {job.target}")
            time.sleep(0.2)


def _unkept(job: Job, stamps: list[files.Stamp | None], error: OSError) -> SourceIndex:
    """Make the index in a file that goes with this process, with a warning."""
    shutil.rmtree(job.parts, ignore_errors=True)
    if is_main_rank():
        warnings.warn(
            f"the index of {job.folder} cannot be kept ({error.strerror}) and is made again at every start; set "
            "data.index_folder to a folder that can be written to.",
            Notice,
            stacklevel=2,
        )
    try:
        with TemporaryDirectory(prefix="pali_index_") as folder:
            own = Job(**(asdict(job) | {"target": os.path.join(folder, os.path.basename(job.target))}))
            _build(own, stamps, None, None)
            return SourceIndex(own.target)  # its bytes stay while they are mapped
    except OSError as failed:
        raise ConfigurationError(
            f"the index of {job.folder} has no place ({failed.strerror}): set data.index_folder to a folder with "
            f"{len(job.names)} files' indices of room (24 bytes a record), or TMPDIR."
        ) from failed


def _main() -> None:
    rank, size = map(int, sys.argv[1:])
    build_share(Job(**json.loads(sys.stdin.buffer.read())), rank, size)


if __name__ == "__main__":
    _main()
