"""Signs of life: a small file of every rank in the run's folder, written by a thread while the rank works.

heartbeats/rank_00003.json    what the rank does now, for `cat` and for the other ranks when nothing goes on
"""

import json
import os
import socket
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass
class Heartbeat:
    """One rank's last sign of life.

    `beats` only grows, so that a reader needs no clock of another machine to see that a rank lives. `frame`: where the
    main thread stands, given once the rank makes no progress; `waits`: that frame waits for other ranks.
    """

    rank: int
    host: str = ""
    process: int = 0
    beats: int = 0
    place: str = ""
    progress_s_ago: float = 0.0
    frame: str | None = None
    waits: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.process})"


class Heartbeats:
    """The signs of life of all ranks of a run: this rank's are written, the others' read."""

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        """`folder`: the run's."""
        self.folder, self.world_size = folder / "heartbeats", world_size
        self.own = Heartbeat(rank, socket.gethostname(), os.getpid())
        self.lock = threading.Lock()  # the watchdog's thread writes, and at the end the main one

    def write(self) -> None:
        """Publish `own` as one more sign of life; a folder that cannot be written to is nobody's end."""
        path = self._path(self.own.rank)
        scratch = path.with_suffix(".tmp")
        with self.lock, suppress(OSError):
            self.own.beats += 1
            self.folder.mkdir(parents=True, exist_ok=True)
            scratch.write_text(json.dumps(asdict(self.own)), encoding="utf-8")
            os.replace(scratch, path)

    def read(self, rank: int) -> Heartbeat | None:
        """The last sign of life of a rank, None where there is none that can be read."""
        try:
            return Heartbeat(**json.loads(self._path(rank).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}.json"
