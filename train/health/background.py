"""Run work that may block in daemon threads, so that a stalled disk or pipe blocks no other thread."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


class BackgroundJob:
    """Run a job again and again, each time in a new daemon thread, at most once at a time."""

    def __init__(self, name: str, job: Callable[[], object]) -> None:
        self.name, self.job = name, job
        self.thread: threading.Thread | None = None
        self.began = 0.0

    def start(self) -> None:
        """Start the job unless it is still running; return at once."""
        if self.thread is None or not self.thread.is_alive():
            self.began = time.monotonic()
            thread = threading.Thread(target=self.job, name=self.name, daemon=True)
            with suppress(RuntimeError):  # the user's limit of threads is reached -> the next start tries again
                thread.start()
                self.thread = thread

    @property
    def busy_s(self) -> float:
        """Return the seconds since the running job began, 0 while none runs."""
        return time.monotonic() - self.began if self.thread is not None and self.thread.is_alive() else 0.0

    def wait(self, within_s: float) -> bool:
        """Wait for the job for at most `within_s` seconds; return whether it is done."""
        if self.thread is not None:
            self.thread.join(within_s)
        return not self.busy_s


def call_within(seconds: float, function: Callable[[], T]) -> T | None:
    """Return what `function` returns, or None if that takes longer than `seconds` or raises OSError."""
    results: list[T] = []

    def run() -> None:
        with suppress(OSError):
            results.append(function())

    job = BackgroundJob("call_within", run)
    job.start()
    job.wait(seconds)
    return results[0] if results else None
