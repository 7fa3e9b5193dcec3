"""Replace a lock by a file, on a file system without locks: one process makes it, and touches it while it lives."""

import os
import secrets
import socket
import threading
from contextlib import suppress
from pathlib import Path

import psutil

BEAT_S = 20.0  # seconds between two touches
STALE_S = 120.0  # an owner without a touch for so long counts as dead; six beats, because a disk may stall for a while


class OwnerFile:
    """Own a file: its first line is the name of the owner, its second one identifies the process.

    The age of a file is the difference of two times that the disk itself has set, so no clock of a machine matters.
    """

    def __init__(self, path: Path, owner: str) -> None:
        self.path = path
        self.text = f"{owner}\n{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}\n"
        self.ended = threading.Event()

    def take(self) -> str | None:
        """Make the file and return None; return the name of the owner if another process has one and lives."""
        while (found := self._found()) is not None:
            if not self._is_dead(found):
                return found.partition("\n")[0] or "another process"
            self._remove(found)
        threading.Thread(target=self._beat, name="owner-file", daemon=True).start()
        return None

    def release(self) -> None:
        """Remove the file if this process still owns it."""
        self.ended.set()
        with suppress(OSError):
            if self.path.read_text(encoding="utf-8") == self.text:
                self.path.unlink()

    def _found(self) -> str | None:
        """Make the file and return None, or return the text of an existing one. Raises OSError where both fail."""
        try:
            with self.path.open("x", encoding="utf-8") as file:
                file.write(self.text)
            return None
        except FileExistsError:
            try:
                return self.path.read_text(encoding="utf-8", errors="replace")
            except FileNotFoundError:  # released between the two calls
                return self._found()

    def _is_dead(self, found: str) -> bool:
        """Return whether the owner has not touched the file for STALE_S, or has died on this machine."""
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
        """Remove a dead owner's file. Of several processes that try, one succeeds; no newer file is removed."""
        aside = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}")
        with suppress(FileNotFoundError):
            os.rename(self.path, aside)
            if aside.read_text(encoding="utf-8", errors="replace") != found:
                with suppress(OSError):
                    os.link(aside, self.path)  # another process was faster, and this is its file -> restore it
            aside.unlink()

    def _beat(self) -> None:
        while not self.ended.wait(BEAT_S):
            with suppress(OSError):  # the disk stalls -> after STALE_S another process may take the folder
                if self.path.read_text(encoding="utf-8", errors="replace") == self.text:
                    os.utime(self.path)
