"""Find weights that are NaN or infinite, before they spread through the model or into a checkpoint."""

from collections.abc import Iterable

import torch
from torch import Tensor


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity, None where all are finite."""
    return next((name for name, tensor in tensors if not is_finite(tensor)), None)


def is_finite(tensor: Tensor) -> bool:
    """Return whether every element is finite."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    least, largest = torch.aminmax(tensor.detach())  # NaN if there is one; no copy, unlike `isfinite`
    return bool(torch.isfinite(least) & torch.isfinite(largest))
