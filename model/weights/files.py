"""Write files of named tensors: .safetensors and .npz; neither runs code when it is read."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from common.files import beside
from model.finite import first_not_finite


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
