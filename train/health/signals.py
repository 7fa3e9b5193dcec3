"""Catch the signals that request the end of a run: the step is finished, a checkpoint saved, then the process ends."""

import signal
from types import FrameType


class StopSignals:
    """Record that SIGTERM, SIGUSR1 or SIGINT came; a second SIGINT ends the process at once.

    Signals may reach a single rank, so the loop reduces `requested` over all ranks in every step.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = False
        self.previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def restore(self) -> None:
        """Restore the handlers that were set before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
