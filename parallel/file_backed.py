"""Memory that is a file: what is offloaded to NVMe is mapped, and the operating system moves its pages."""

from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import Tensor


class Disk:
    """Makes CPU tensors whose memory lies in a folder; it is given back when they go, also after a crash."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def zeros(self, size: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
        self.folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=self.folder) as file:  # unlinked here: the mapping alone keeps it
            return torch.from_file(file.name, shared=True, size=size.numel(), dtype=dtype).view(size)

    def copy(self, x: Tensor) -> Tensor:
        return self.zeros(x.shape, x.dtype).copy_(x)
