"""Recognize a lack of memory by what torch, CUDA, NCCL and Python raise."""

import torch

NOT_ENOUGH = ("can't allocate memory", "not enough memory", "out of memory")


def is_lack_of_memory(error: BaseException) -> bool:
    """Return whether an allocation has failed, on the GPU or in RAM."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NOT_ENOUGH)
