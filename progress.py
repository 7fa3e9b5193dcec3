"""What a process does now: told by whoever completes something, heard by who watches over it (`train/watchdog.py`)."""

from collections.abc import Callable

listeners: list[Callable[[str], None]] = []


def beat(place: str = "") -> None:
    """Something was completed; `place` says what is done next, nothing: more of the same. Only who listens hears it."""
    for listener in listeners:
        listener(place)
