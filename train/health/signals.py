"""Signals that ask a run to end: the step is finished, a checkpoint saved, and the process leaves."""

import signal
from types import FrameType


class Interrupt:
    """Remembers that SIGTERM, SIGUSR1 or SIGINT came; a second SIGINT ends the process at once.

    One rank may hear what the others do not: the loop lets all ranks agree on `asked` in every step.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.asked = False
        self.previous = {number: signal.signal(number, self._hear) for number in self.SIGNALS}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def restore(self) -> None:
        """Give the signals back to who had them before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
