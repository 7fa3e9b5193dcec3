"""Report whether a GPU still has work of its rank, for the watchdog.

Under NCCL no host waits within a collective: it enqueues work and stops at the next number that it reads, wherever that
is. A rank whose GPU has unfinished work waits there, for its peers as a rule; a rank whose GPU is idle is the cause.
"""

import torch


class DeviceQueue:
    """Mark what a rank has enqueued on its device, and query whether all of it has been done."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.last: torch.cuda.Event | None = None

    def mark(self) -> None:
        """Record an event in the current stream; call it in the thread that enqueues."""
        if self.on_gpu:
            event = torch.cuda.Event()
            event.record()
            self.last = event

    def is_busy(self) -> bool:
        """Return whether the device has not come to the last mark yet; any thread may call, and none waits."""
        return self.last is not None and not self.last.query()
