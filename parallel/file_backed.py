"""Map offloaded tensors into files (NVMe offload); the operating system moves their pages."""

from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import Tensor


class Disk:
    """Make CPU tensors whose memory lies in a folder.

    The disk space is freed with the tensor, also after a crash, because no name of the file is left.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def zeros(self, size: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor of zeros whose memory is a new file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=self.folder) as file:  # unlinked at the end of the block: the mapping keeps it
            return torch.from_file(file.name, shared=True, size=size.numel(), dtype=dtype).view(size)

    def copy(self, x: Tensor) -> Tensor:
        """Return a copy of `x` whose memory is a new file."""
        return self.zeros(x.shape, x.dtype).copy_(x)
