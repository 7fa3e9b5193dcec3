"""Ends a process that makes no progress: a peer that died or hangs must not keep the others waiting for ever."""

import faulthandler
import os
import socket
import sys
import threading
import time

from parallel.launch import launch

EXIT_HUNG = 4


class Watchdog:
    """While it is entered, `beat` must be called at least every `timeout_s` seconds; a thread looks after it.

    If no beat comes, it says which rank stands still and after what, prints where every thread is, and ends the process
    with exit code 4: a collective that waits for a dead peer cannot be interrupted in any other way. The launcher then
    ends the other ranks.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s, self.left = timeout_s, threading.Event()

    def __enter__(self) -> "Watchdog":
        self.left.clear()
        self.beat("start-up")
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.left.set()

    def beat(self, place: str) -> None:
        """Something was done; `place` says what, for the message."""
        self.place, self.last_beat = place, time.monotonic()

    def _watch(self) -> None:
        while not self.left.wait(min(1.0, self.timeout_s / 4)):
            if time.monotonic() - self.last_beat > self.timeout_s:
                self._end()

    def _end(self) -> None:
        print(
            f"Rank {launch().rank} on {socket.gethostname()} (process {os.getpid()}) stands still: after {self.place} "
            f"nothing was completed for parallel.timeout_s={self.timeout_s:g} seconds; it, or a peer, hangs here:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        os._exit(EXIT_HUNG)
