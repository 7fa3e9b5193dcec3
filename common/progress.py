"""Report the current activity of a process to its listeners, such as `train/health/watchdog.py`."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

listeners: list[Callable[[str], None]] = []
awaited: dict[int, int] = {}
"""Threads that wait for another one of this process -> that one, which does their work (`threading.get_ident`)."""


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Report to the listener within the context."""
    listeners.append(listener)
    try:
        yield
    finally:
        listeners.remove(listener)


def beat(activity: str = "") -> None:
    """Report progress to every listener. `activity` names what is done next; empty keeps the current one."""
    for listener in listeners:
        listener(activity)


@contextmanager
def waiting_for(thread: int | None) -> Iterator[None]:
    """Mark that the calling thread waits for another one of this process, for those who look where it is."""
    own = threading.get_ident()
    if thread is not None:
        awaited[own] = thread
    try:
        yield
    finally:
        awaited.pop(own, None)
