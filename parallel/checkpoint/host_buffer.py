"""Host memory that a state is copied into, so that training may go on while the copy is written."""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; of a cache line, and of every data type


class Staging:
    """One buffer, pinned where there are GPUs, that grows once and is used again for every copy."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The values on the host, valid until the next copy; the originals may change as soon as this returns."""
        sizes = [-(-x.nbytes // ALIGNMENT) * ALIGNMENT for x in tensors]
        if sum(sizes) > self.memory.numel():
            self.memory = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self.memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        places = self.memory[: sum(sizes)].split(sizes)
        copies = [
            place[: x.nbytes].view(x.dtype).view(x.shape).copy_(x, non_blocking=True)
            for x, place in zip(tensors, places, strict=True)
        ]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies
