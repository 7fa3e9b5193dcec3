"""Report what a process does now, to the listeners that watch over it (`train/health/watchdog.py` is one)."""

from collections.abc import Callable

listeners: list[Callable[[str], None]] = []


def beat(place: str = "") -> None:
    """Report progress to every listener. `place` names the next activity; empty keeps the current one."""
    for listener in listeners:
        listener(place)
