"""Host memory for a copy of the state, so that training continues while the copy is written."""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line, and a multiple of every element size


class HostBuffer:
    """One buffer, pinned if there are GPUs, that grows to the largest copy and is reused for every copy."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copy values to the host; valid until the next copy. The originals may change when this returns."""
        sizes = [-(-x.nbytes // ALIGNMENT) * ALIGNMENT for x in tensors]
        if sum(sizes) > self.memory.numel():
            self.memory = torch.empty(0, dtype=torch.uint8)  # free the old one before making the new one
            self.memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        slots = self.memory[: sum(sizes)].split(sizes)
        copies = [
            slot[: x.nbytes].view(x.dtype).view(x.shape).copy_(x, non_blocking=True)
            for x, slot in zip(tensors, slots, strict=True)
        ]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies
