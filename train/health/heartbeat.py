"""Write signs of life: every rank writes one in its machine's memory, one rank of a machine copies them to the run.

/dev/shm/pali-<user>-<run>/rank_00003.json     every rank, for the ranks of its machine
heartbeats/<host>_rank_00000.jsonl             a line for each rank of a machine, for `cat` and for other machines

So the run's folder, on a disk that all machines share, gets one small file of each machine at a time, whatever the
number of ranks. If ranks of a machine do not see each other's memory (a container each), each writes its own.
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
from train.health.background import Errand

MEMORY = Path("/dev/shm")


@dataclass
class Heartbeat:
    """Hold one rank's last sign of life.

    `beats` only grows, so that a reader needs no clock of another machine to see that a rank lives. `frame`: the main
    thread's frame, given once the rank makes no progress; `waits`: that frame waits for other ranks. `started` (seconds
    since 1970) separates an earlier process of the same rank from this one; `at` is of the machine's own clock.
    """

    rank: int
    host: str = ""
    process: int = 0
    beats: int = 0
    place: str = ""
    progress_s_ago: float = 0.0
    frame: str | None = None
    waits: bool = False
    started: float = 0.0
    at: float = 0.0

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.process})"


class Heartbeats:
    """Write this rank's signs of life and read those of all ranks of a run.

    The rank that writes to the run's folder is the lowest of its machine that has beaten in the last `fresh_s` seconds.
    """

    def __init__(
        self, folder: Path, rank: int, world_size: int, fresh_s: float = 15.0, machine: Path | None = None
    ) -> None:
        """`folder`: the run's; `machine`: a folder that the ranks of this machine share, else one is made."""
        self.folder, self.world_size, self.fresh_s = folder / "heartbeats", world_size, fresh_s
        self.machine = machine_folder(folder) if machine is None else machine
        self.own = Heartbeat(rank, socket.gethostname(), os.getpid(), started=time.time())
        self.begun = time.monotonic()
        self.is_first_here = os.environ.get("LOCAL_RANK", "0") == "0"
        self.is_published = True  # perhaps by an earlier process
        self.nearby_lock, self.far_lock = threading.Lock(), threading.Lock()  # a rank at its end has two writers
        self.nearby, self.far = Errand("heart-beat", self._write_nearby), Errand("heart-beats", self._publish)
        for path, beat in self._files_nearby():
            if beat is None or not self._is_fresh(beat):
                path.unlink(missing_ok=True)  # of an earlier process

    def beat(self) -> None:
        """Give one more sign of life, written aside; errors are ignored: a full disk must not end a run."""
        self._count()
        self.nearby.start()
        self.far.start()

    def write(self) -> None:
        """Give one more sign of life and wait until it is written, to the run's folder too, also beside another writer.

        For a rank at its end.
        """
        self._count()
        self._write_nearby()
        self._publish(only_own=not self.leads())

    def leads(self) -> bool:
        """Return whether this rank writes to the run's folder for its machine."""
        if any(rank < self.own.rank and self._is_fresh(beat) for rank, beat in self.read_nearby().items()):
            return False
        return self.is_first_here or time.monotonic() - self.begun > self.fresh_s

    def read_nearby(self) -> dict[int, Heartbeat]:
        """Return the last signs of life of the ranks of this machine, this one included."""
        return newest([*filter(None, (beat for _, beat in self._files_nearby())), self.own])

    def read(self) -> dict[int, Heartbeat]:
        """Return the last signs of life of all ranks that gave one."""
        found = newest([*published(self.folder.parent).values(), *self.read_nearby().values()])
        return {rank: beat for rank, beat in found.items() if rank < self.world_size}

    def close(self, within_s: float) -> None:
        """Wait for what is being written, and leave nothing in the machine's memory."""
        self.far.wait(within_s)
        if self.nearby.wait(within_s) and self.machine is not None:
            with suppress(OSError):
                self._nearby_path.unlink(missing_ok=True)
                self.machine.rmdir()  # raises while other ranks are in it

    @property
    def _nearby_path(self) -> Path:
        assert self.machine is not None
        return self.machine / f"rank_{self.own.rank:05d}.json"

    def _count(self) -> None:
        self.own.beats += 1
        self.own.at = time.monotonic()

    def _is_fresh(self, beat: Heartbeat) -> bool:
        return 0 <= time.monotonic() - beat.at <= self.fresh_s

    def _files_nearby(self) -> list[tuple[Path, Heartbeat | None]]:
        found = []
        for path in sorted(self.machine.glob("rank_*.json")) if self.machine is not None else []:
            with suppress(OSError):
                found.append((path, parsed(path.read_text(encoding="utf-8"))))
        return found

    def _write_nearby(self) -> None:
        if self.machine is not None:
            with self.nearby_lock, suppress(OSError):
                replace_text(self._nearby_path, json.dumps(asdict(self.own)))

    def _publish(self, only_own: bool = False) -> None:
        """Copy the signs of life of this machine to the run's folder, if this rank is the one to do so."""
        path = self.folder / f"{self.own.host}_rank_{self.own.rank:05d}.jsonl"
        with self.far_lock, suppress(OSError):
            if only_own or self.leads():
                beats = [self.own] if only_own else self.read_nearby().values()
                self.is_published = True
                replace_text(path, "".join(json.dumps(asdict(beat)) + "\n" for beat in beats))
            elif self.is_published:
                self.is_published = False
                path.unlink(missing_ok=True)


def machine_folder(folder: Path) -> Path | None:
    """Return a folder in this machine's memory that only this user can enter, for the ranks of the run in `folder`.

    None if there is no safe place for one.
    """
    run = hashlib.sha256(os.path.abspath(folder).encode()).hexdigest()[:16]
    for base in (lambda: MEMORY, lambda: Path(tempfile.gettempdir())):
        path = base() / f"pali-{os.getuid()}-{run}"
        with suppress(OSError):
            path.mkdir(mode=0o700, exist_ok=True)
            found = path.lstat()  # of the path itself, in case it is somebody else's link
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
                return path
    return None


def published(folder: Path) -> dict[int, Heartbeat]:
    """Return the last signs of life in the folder of a run, by rank."""
    found: list[Heartbeat] = []
    for path in sorted((folder / "heartbeats").glob("*.jsonl")):
        with suppress(OSError):
            found += filter(None, map(parsed, path.read_text(encoding="utf-8").splitlines()))
    return newest(found)


def newest(beats: Iterable[Heartbeat]) -> dict[int, Heartbeat]:
    """Return the last of each rank's signs of life, by rank."""
    found: dict[int, Heartbeat] = {}
    for beat in sorted(beats, key=lambda each: (each.rank, each.started, each.beats)):
        found[beat.rank] = beat
    return found


def parsed(text: str) -> Heartbeat | None:
    """Return a sign of life from its text; None for any other text."""
    try:
        return Heartbeat(**json.loads(text))
    except (ValueError, TypeError):
        return None


def replace_text(path: Path, text: str) -> None:
    """Write a file in one piece; make its folder if it is missing."""
    try:
        write_text(path, text)
    except FileNotFoundError:  # checked only now, to spare a shared disk a look at each beat
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
