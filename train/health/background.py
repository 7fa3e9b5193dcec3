"""Run jobs that may block in threads of their own, so that a disk or pipe that does not answer delays nothing else."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


class Errand:
    """Run a job again and again, each time in a daemon thread, at most once at a time."""

    def __init__(self, name: str, job: Callable[[], object]) -> None:
        self.name, self.job = name, job
        self.thread: threading.Thread | None = None
        self.began = 0.0

    def start(self) -> None:
        """Begin the job, unless it is still being done; return at once."""
        if self.thread is None or not self.thread.is_alive():
            self.began = time.monotonic()
            thread = threading.Thread(target=self.job, name=self.name, daemon=True)
            with suppress(RuntimeError):  # this user may start no more threads
                thread.start()
                self.thread = thread

    @property
    def busy_s(self) -> float:
        """Seconds since the job began; 0 if it is done."""
        return time.monotonic() - self.began if self.thread is not None and self.thread.is_alive() else 0.0

    def wait(self, within_s: float) -> bool:
        """Wait for the job; return whether it is done."""
        if self.thread is not None:
            self.thread.join(within_s)
        return not self.busy_s


def within(seconds: float, job: Callable[[], T]) -> T | None:
    """Return the result of `job`, or None if it takes longer than `seconds` or raises OSError."""
    results: list[T] = []

    def run() -> None:
        with suppress(OSError):
            results.append(job())

    errand = Errand("aside", run)
    errand.start()
    errand.wait(seconds)
    return results[0] if results else None
