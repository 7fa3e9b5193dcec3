"""A file in place of a lock where the file system has none: made by one process, and touched while it lives."""

import os
import secrets
import socket
import threading
from contextlib import suppress
from pathlib import Path

import psutil

BEAT_S = 20.0  # between two touches
STALE_S = 120.0  # without a touch the owner counts as dead: six beats, so that a disk may stall for a while


class OwnerFile:
    """Its first line names the owner, its second one identifies it.

    Ages are differences of two times of the same disk's clock.
    """

    def __init__(self, path: Path, owner: str) -> None:
        self.path = path
        self.text = f"{owner}\n{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}\n"
        self.ended = threading.Event()

    def take(self) -> str | None:
        """Make the file if there is none, or one of a dead process; else return who owns it."""
        while (found := self._found()) is not None:
            if not self._is_dead(found):
                return found.partition("\n")[0] or "another process"
            self._remove(found)
        threading.Thread(target=self._beat, name="owner-file", daemon=True).start()
        return None

    def release(self) -> None:
        """Remove the file, if it is still this process's."""
        self.ended.set()
        with suppress(OSError):
            if self.path.read_text(encoding="utf-8") == self.text:
                self.path.unlink()

    def _found(self) -> str | None:
        """Make the file; return None, or the text of the one that is there. Raises OSError where that cannot be."""
        try:
            with self.path.open("x", encoding="utf-8") as file:
                file.write(self.text)
            return None
        except FileExistsError:
            try:
                return self.path.read_text(encoding="utf-8", errors="replace")
            except FileNotFoundError:  # given back just now
                return self._found()

    def _is_dead(self, found: str) -> bool:
        """Return whether the owner has not touched the file for long, or has died on this machine."""
        host, _, identity = found.partition("\n")[2].partition(" ")
        process = identity.partition(" ")[0]
        if host == socket.gethostname() and process.isdecimal() and not psutil.pid_exists(int(process)):
            return True
        probe = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}")
        try:
            probe.touch()
            return probe.stat().st_mtime - self.path.stat().st_mtime > STALE_S
        except FileNotFoundError:
            return False
        finally:
            probe.unlink(missing_ok=True)

    def _remove(self, found: str) -> None:
        """Take a dead owner's file away; of several processes that try, one takes it, and the others none newer."""
        aside = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}")
        with suppress(FileNotFoundError):
            os.rename(self.path, aside)
            if aside.read_text(encoding="utf-8", errors="replace") != found:
                with suppress(OSError):
                    os.link(aside, self.path)  # somebody was faster: back with it
            aside.unlink()

    def _beat(self) -> None:
        while not self.ended.wait(BEAT_S):
            with suppress(OSError):  # a disk that stalls: others may take the folder after STALE_S
                if self.path.read_text(encoding="utf-8", errors="replace") == self.text:
                    os.utime(self.path)
