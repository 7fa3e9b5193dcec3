"""Report the current activity of a process to its listeners, such as `train/health/watchdog.py`."""

from collections.abc import Callable

listeners: list[Callable[[str], None]] = []


def beat(activity: str = "") -> None:
    """Report progress to every listener. `activity` names what is done next; empty keeps the current one."""
    for listener in listeners:
        listener(activity)
