"""Run a side of a comparison in its own process, so that its memory is measured alone and sides can take turns."""

import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch


class Worker:
    """A new process that calls `make(*arguments)` once, and the step that it returns on request.

    `cpu`: measure the seconds that its threads spend on a processor, which other work on the machine changes little.
    """

    def __init__(
        self, make: Callable[..., Callable[[], float]], *arguments: Any, threads: int | None = None, cpu: bool = False
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments, threads, cpu), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()

    def step(self) -> float:
        """Take a step; return its seconds."""
        self.pipe.send("step")
        return float(self.pipe.recv())

    def close(self) -> int:
        """End the process; return its peak memory in bytes (of the GPU where there is one)."""
        self.pipe.send("close")
        peak = int(self.pipe.recv())
        self.process.join()
        return peak


def _serve(
    pipe: Connection, make: Callable[..., Callable[[], float]], arguments: tuple, threads: int | None, cpu: bool
) -> None:
    clock = time.process_time if cpu else time.perf_counter
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    step = make(*arguments)
    pipe.send("ready")
    while pipe.recv() == "step":
        _synchronize()
        start = clock()
        step()
        _synchronize()
        pipe.send(clock() - start)
    pipe.send(peak_bytes())


def peak_bytes() -> int:
    """Return the peak memory that this process allocated on the GPU, or its peak resident memory on CPUs."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
