"""Patch libraries where they offer no setting; every patch names its library's version and its reason.

Each function patches for the whole process. tests/unit/common/test_library_patches.py fails for a patch that is no
longer needed or no longer works. Two other modules change libraries: common/strict_omegaconf.py (values that OmegaConf
would convert silently) and parallel/communication_time.py (which wraps waits of torch.distributed to time them, and
restores them). parallel/engine/zero3.py lists private names of DeepSpeed that it reads or sets on single objects.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def without_compilers_and_loggers() -> Iterator[None]:
    """Disable torch.compile and hide wandb while Megatron is imported.

    megatron-core 0.16.1 compiles functions as it is imported, which loads Dynamo, Inductor and sympy, and it imports
    wandb. We call none of these functions -> without this, every process takes 2 s more CPU to start.
    """
    compiles, loaded = torch.compile, "wandb" in sys.modules

    def as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
        return function if function is not None else as_it_is

    torch.compile = as_it_is  # type: ignore[assignment]
    if not loaded:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiles
        if not loaded:
            del sys.modules["wandb"]


def let_megatron_use_cpus() -> None:
    """Make `torch.cuda.current_device()` return the CPU in a process without CUDA.

    megatron-core 0.16.1 allocates the buffers of sequence parallelism on the current CUDA device, under gloo too ->
    without this, tensor parallelism with split sequences raises on CPUs.
    """
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]


def let_megatron_plan(layers: ModuleType) -> None:
    """Make Megatron's layers take size and rank from the group that they are given, before any group has started.

    megatron-core 0.16.1 ignores the group until torch.distributed has started -> without this, a tensor-parallel model
    cannot be planned before, with the shapes that its ranks will hold. `layers` is its module of parallel layers.
    """
    layers.get_tensor_model_parallel_group_if_none = lambda tp_group, **_: tp_group  # type: ignore[attr-defined]
    layers.get_pg_size = lambda group: group.size()  # type: ignore[attr-defined]
    layers.get_pg_rank = lambda group: group.rank()  # type: ignore[attr-defined]


def skip_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling and loading its all-reduce in shared memory.

    DeepSpeed 0.19.8 does so on CPUs as it starts: half a minute of a C++ compiler at the first time, and 66 MiB of
    shared memory for each rank. Only its `inference_all_reduce` uses the op, and we do not call it.
    """
    import deepspeed  # slow to import -> only stage 3's engine, which has imported it, calls this

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def set_secondary_group(group: dist.ProcessGroup) -> None:
    """Set the ranks that share a second copy of parameters (ZeRO++ hpZ).

    DeepSpeed 0.19.8 makes this group itself, from neighbors in the world, which may be tensor-parallel ranks of one
    replica; a second call of its function fails.
    """
    from deepspeed.utils import groups  # slow to import, as above

    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = group
