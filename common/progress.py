"""Report the current activity of a process to its listeners, such as `train/health/watchdog.py`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

listeners: list[Callable[[str], None]] = []


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
