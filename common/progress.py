"""Report what a process does now, to the listeners that watch over it (`train/health/watchdog.py` is one)."""

from collections.abc import Callable

listeners: list[Callable[[str], None]] = []


def beat(activity: str = "") -> None:
    """Report progress to every listener. `activity` names what is done next; empty keeps the current one."""
    for listener in listeners:
        listener(activity)
