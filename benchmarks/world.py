"""Start a world of processes on this machine and run a function in it, for benchmarks and tests."""

import gc
import os
import socket
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.multiprocessing as multiprocessing

# Modules that the server imports before it forks ranks: an import takes seconds, and there are many ranks.
preloaded = ["parallel.engine.zero3"]


def run_world(size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Run `function(*arguments)` on `size` ranks with torchrun's variables set; raise the failure of any rank.

    Ranks use one thread each. On CPUs they are forked from one server that has imported everything.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    method = "spawn" if torch.cuda.device_count() else "forkserver"  # CUDA does not survive a fork
    get_context("forkserver").set_forkserver_preload(preloaded)
    with patch.dict(os.environ, visible(size)):  # before a rank imports anything that looks for GPUs
        multiprocessing.start_processes(_rank, (size, port, function, arguments), nprocs=size, start_method=method)  # type: ignore


def backend(size: int) -> str:
    """Return NCCL where every rank can have a GPU of its own, else gloo."""
    return "nccl" if torch.cuda.device_count() >= size else "gloo"


def visible(size: int) -> Mapping[str, str]:
    """Return the variables that make ranks choose that backend: GPUs are hidden where there are too few."""
    return {} if backend(size) == "nccl" else {"CUDA_VISIBLE_DEVICES": ""}


def results_file(folder: Path, name: str) -> Path:
    """Return the file in which a world leaves tensors for the process that started it."""
    return folder / f"{name}.pt"


def _rank(rank: int, size: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage for every engine, and what the server has imported would be searched too
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        from parallel.distributed import stop

        stop()
