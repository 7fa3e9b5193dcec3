"""Read and write files of named tensors: .safetensors and .npz; neither runs code when it is read."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import ConfigurationError
from common.files import beside
from model.finite import first_not_finite
from model.weights.big_vision import unstack_blocks


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read every tensor of a .safetensors file, of a folder of them, or of an .npz file (nothing is unpickled)."""
    path = Path(path)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return unstack_blocks({name: torch.from_numpy(arrays[name]) for name in arrays.files})
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or any(file.suffix != ".safetensors" or not file.is_file() for file in files):
        raise ConfigurationError(f"{path} is neither a .safetensors file, a folder of them, nor an .npz file.")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def write_tensors(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a state dict in one piece, as .npz if the name ends so, else as .safetensors.

    Raises ValueError for a tensor that is not finite, and OSError if the disk is full.
    """
    if (name := first_not_finite(tensors.items())) is not None:
        raise ValueError(f"{name} is not finite, so {path} is not written.")
    with beside(Path(path)) as scratch:
        if Path(path).suffix == ".npz":
            arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
            with scratch.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        else:
            try:
                save_file(dict(tensors), scratch, metadata={"format": "pt"})
            except SafetensorError as error:  # it has the system's error number in its text only
                if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
                    raise
                raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
