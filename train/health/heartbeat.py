"""Exchange heartbeats: every rank writes its own to its machine's memory, one rank a machine copies all to the run.

/dev/shm/pali-<user>-<run>/rank_00003.json     of every rank, read by the ranks of its machine
heartbeats/<host>_rank_00000.jsonl             a line for each rank of a machine, read by `cat` and by other machines

So the run's folder, on a disk that all machines share, gets one small file per machine at a time, however many ranks
there are. Ranks of one machine that do not share its memory (one container each) each write a file of their own.
"""

import hashlib
import json
import os
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from common.files import write_text
from train.health.background import BackgroundJob

MEMORY = Path("/dev/shm")


@dataclass
class Heartbeat:
    """The last heartbeat of one rank.

    `beats` only grows, so that a reader sees progress without comparing clocks of two machines. `activity`: what the
    rank does now. `frame`: the line at which the main thread is, set once the rank makes no progress. `waits`: that
    frame waits for other ranks. `started` (seconds since 1970) distinguishes the processes of a rank that restarted.
    `at`: seconds of the machine's monotonic clock.
    """

    rank: int
    host: str = ""
    process: int = 0
    beats: int = 0
    activity: str = ""
    progress_s_ago: float = 0.0
    frame: str | None = None
    waits: bool = False
    started: float = 0.0
    at: float = 0.0

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.process})"


class Heartbeats:
    """Write the heartbeat of this rank, and read those of all ranks of a run.

    The lowest rank of a machine with a heartbeat in the last `fresh_s` seconds copies those of the machine to the run.
    """

    def __init__(
        self, folder: Path, rank: int, world_size: int, fresh_s: float = 15.0, machine: Path | None = None
    ) -> None:
        """`folder`: that of the run; `machine`: a folder that the ranks of this machine share, None to make one."""
        self.folder, self.world_size, self.fresh_s = folder / "heartbeats", world_size, fresh_s
        self.machine = machine_folder(folder) if machine is None else machine
        self.own = Heartbeat(rank, socket.gethostname(), os.getpid(), started=time.time())
        self.begun = time.monotonic()
        self.is_first_here = os.environ.get("LOCAL_RANK", "0") == "0"
        self.is_published = True  # an earlier process of this rank may have left its file -> it is removed
        # A rank that ends also writes from its main thread, while a background job may still write.
        self.local_lock, self.shared_lock = threading.Lock(), threading.Lock()
        self.local_job = BackgroundJob("local heartbeat", self._write_local)
        self.shared_job = BackgroundJob("shared heartbeats", self._publish)
        for path, beat in self._local_files():
            if beat is None or not self._is_fresh(beat):
                path.unlink(missing_ok=True)  # left by an earlier process

    def beat(self) -> None:
        """Count one more beat and write it in the background.

        Write errors are ignored: a full disk must not stop training.
        """
        self._count()
        self.local_job.start()
        self.shared_job.start()

    def write(self) -> None:
        """Count one more beat and wait until it is in the run's folder too, whether this rank publishes or not.

        A rank that ends calls this, so that every other rank can read its last `frame`.
        """
        self._count()
        self._write_local()
        self._publish(only_own=not self.is_publisher())

    def is_publisher(self) -> bool:
        """Return whether this rank writes to the run's folder for its machine."""
        if any(rank < self.own.rank and self._is_fresh(beat) for rank, beat in self.read_local().items()):
            return False
        return self.is_first_here or time.monotonic() - self.begun > self.fresh_s

    def read_local(self) -> dict[int, Heartbeat]:
        """Return the last heartbeats of the ranks of this machine, this one included, by rank."""
        return newest([*filter(None, (beat for _, beat in self._local_files())), self.own])

    def read(self) -> dict[int, Heartbeat]:
        """Return the last heartbeats of all ranks that have one, by rank."""
        found = newest([*published(self.folder.parent).values(), *self.read_local().values()])
        return {rank: beat for rank, beat in found.items() if rank < self.world_size}

    def close(self, within_s: float) -> None:
        """Wait for pending writes, at most `within_s` seconds each; remove the file from the machine's memory."""
        self.shared_job.wait(within_s)
        if self.local_job.wait(within_s) and self.machine is not None:
            with suppress(OSError):
                self._local_path.unlink(missing_ok=True)
                self.machine.rmdir()  # raises while other ranks are in it

    @property
    def _local_path(self) -> Path:
        assert self.machine is not None
        return self.machine / f"rank_{self.own.rank:05d}.json"

    def _count(self) -> None:
        self.own.beats += 1
        self.own.at = time.monotonic()

    def _is_fresh(self, beat: Heartbeat) -> bool:
        return 0 <= time.monotonic() - beat.at <= self.fresh_s

    def _local_files(self) -> list[tuple[Path, Heartbeat | None]]:
        found = []
        for path in sorted(self.machine.glob("rank_*.json")) if self.machine is not None else []:
            with suppress(OSError):
                found.append((path, parse(path.read_text(encoding="utf-8"))))
        return found

    def _write_local(self) -> None:
        if self.machine is not None:
            with self.local_lock, suppress(OSError):
                replace_text(self._local_path, json.dumps(asdict(self.own)))

    def _publish(self, only_own: bool = False) -> None:
        """Copy the heartbeats of this machine to the run's folder if this rank is its publisher; else remove its file.

        `only_own`: write this rank's heartbeat, publisher or not.
        """
        path = self.folder / f"{self.own.host}_rank_{self.own.rank:05d}.jsonl"
        with self.shared_lock, suppress(OSError):
            if only_own or self.is_publisher():
                beats = [self.own] if only_own else self.read_local().values()
                self.is_published = True
                replace_text(path, "".join(json.dumps(asdict(beat)) + "\n" for beat in beats))
            elif self.is_published:
                self.is_published = False
                path.unlink(missing_ok=True)


def machine_folder(folder: Path) -> Path | None:
    """Make a folder in this machine's memory that only this user can enter, for the ranks of the run in `folder`.

    Returns None where no such folder can be made.
    """
    run = hashlib.sha256(os.path.abspath(folder).encode()).hexdigest()[:16]
    for base in (lambda: MEMORY, lambda: Path(tempfile.gettempdir())):
        path = base() / f"pali-{os.getuid()}-{run}"
        with suppress(OSError):
            path.mkdir(mode=0o700, exist_ok=True)
            found = path.lstat()  # not stat: another user may have put a link here
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
                return path
    return None


def published(folder: Path) -> dict[int, Heartbeat]:
    """Return the last heartbeats in the folder of a run, by rank."""
    found: list[Heartbeat] = []
    for path in sorted((folder / "heartbeats").glob("*.jsonl")):
        with suppress(OSError):
            found += filter(None, map(parse, path.read_text(encoding="utf-8").splitlines()))
    return newest(found)


def newest(beats: Iterable[Heartbeat]) -> dict[int, Heartbeat]:
    """Return the last heartbeat of each rank, by rank."""
    found: dict[int, Heartbeat] = {}
    for beat in sorted(beats, key=lambda each: (each.rank, each.started, each.beats)):
        found[beat.rank] = beat
    return found


def parse(text: str) -> Heartbeat | None:
    """Parse a line of a heartbeat file; None where it is no heartbeat."""
    try:
        return Heartbeat(**json.loads(text))
    except (ValueError, TypeError):
        return None


def replace_text(path: Path, text: str) -> None:
    """Write a file in one piece; make its folder if it is missing."""
    try:
        write_text(path, text)
    except FileNotFoundError:  # tested only on failure -> a beat costs the shared disk no lookup
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
