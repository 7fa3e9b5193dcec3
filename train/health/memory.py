"""Measure the memory of this process, and recognize errors that mean too little of it."""

import resource

import torch

GIB = 2**30  # bytes
NOT_ENOUGH = ("can't allocate memory", "not enough memory", "out of memory")


def is_lack_of_memory(error: BaseException) -> bool:
    """Return whether an allocation has failed, on the GPU or in RAM."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NOT_ENOUGH)


def memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process: allocated on the GPU, otherwise resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux reports KiB
