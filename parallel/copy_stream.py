"""Copy micro-batches to a GPU while it computes."""

from collections.abc import Sequence

import torch

from model.batch import MicroBatch


class CopyStream:
    """Copy micro-batches to a device; to a GPU in a stream of its own, beside the update of the step before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Return the micro-batches on the device; what is enqueued after this call runs after the copies.

        The host does not wait for copies from page-locked memory.
        """
        if self._stream is None:
            return [batch.to(self._device) for batch in batches]
        with torch.cuda.stream(self._stream):
            moved = [batch.to(self._device) for batch in batches]
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for batch, before in zip(moved, batches, strict=True):
            if before.encoder_segments.device != self._device:
                batch.record_stream(current)
        return moved
