"""Trace some steps of a run, and report the content of memory when it does not suffice."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from common.errors import ConfigurationError, RunStopped
from train.config import ProfileConfig
from train.health.memory import GIB, is_lack_of_memory, memory_bytes

WANTED = re.compile(r"[Tt]ried to allocate ([\d.]+ \w+)")  # in torch's messages of a failed allocation, on GPU and CPU
HISTORY_ENTRIES = 100_000  # allocations, with their stacks, that the snapshot holds


def profiled_steps(config: ProfileConfig) -> range:
    """Return `profile.steps`, such as 100-105, as a range with both ends; empty where it is null."""
    if config.steps is None:
        return range(0)
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", config.steps)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 0 < first <= last:
        raise ConfigurationError(
            f"profile.steps={config.steps} is no range of steps; give the first and the last one, e.g. 100-105."
        )
    return range(first, last + 1)


class Profiler:
    """Trace the steps of `profile.steps` on the ranks of `profile.ranks`: time, shapes and memory of every operation.

    profile/rank_00000_steps_100-105.pt.trace.json.gz    opens in Perfetto, chrome://tracing and TensorBoard
    """

    def __init__(self, config: ProfileConfig, folder: Path, rank: int, device: torch.device) -> None:
        """`folder`: the folder of the run."""
        self.steps = profiled_steps(config) if rank in config.ranks else range(0)
        self.device = device
        span = f"{self.steps[0]}-{self.steps[-1]}" if self.steps else ""
        self.path = folder / "profile" / f"rank_{rank:05d}_steps_{span}.pt.trace.json.gz"
        self.trace: torch.profiler.profile | None = None

    def begin(self, step: int) -> None:
        """Start the trace if the step is in the range; a run that resumes within the range traces the rest of it."""
        if step in self.steps and self.trace is None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.trace = torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True)
            self.trace.start()

    def end(self, step: int) -> str | None:
        """Write the trace after the last step of the range; return a sentence with its path then, otherwise None."""
        if self.trace is None or step < self.steps[-1]:
            return None
        return self.close()

    def close(self) -> str | None:
        """Write the trace of the steps so far; return a sentence with its path, None where there is no trace."""
        if self.trace is None:
            return None
        trace, self.trace = self.trace, None
        trace.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(self.path))
        return f"The trace is in {self.path}; open it at https://ui.perfetto.dev."


@contextmanager
def explain_lack_of_memory(config: ProfileConfig, folder: Path, rank: int, device: torch.device) -> Iterator[None]:
    """Raise RunStopped with one sentence where memory does not suffice; on a GPU write a snapshot of memory too.

    With `profile.memory_history` the snapshot holds the line of each allocation (open it at https://pytorch.org/memory_viz).
    """
    history = config.memory_history and device.type == "cuda"
    if history:
        torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES)
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_lack_of_memory(error):
            raise
        raise RunStopped(_sentence(error, folder, rank, device), alone=True) from error
    finally:
        if history:
            torch.cuda.memory._record_memory_history(enabled=None)


def _sentence(error: BaseException, folder: Path, rank: int, device: torch.device) -> str:
    wanted = WANTED.search(str(error))
    more = f"{_readable(wanted[1])} more could not be had" if wanted else "more could not be had"
    return (
        f"Out of memory on rank {rank}: {more}; {_held(device)}{_snapshot(folder, rank, device)}. Take a smaller "
        "parallel.micro_batch_size, parallel.recompute=block, a higher parallel.zero_stage or more ranks."
    )


def _readable(size: str) -> str:
    """Convert a size in bytes, as the CPU allocator reports it, to GiB; keep those with another unit."""
    number, unit = size.split()
    return f"{float(number) / GIB:.2f} GiB" if unit == "bytes" else size


def _held(device: torch.device) -> str:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return (
            f"{allocated / GIB:.2f} GiB are allocated and {(reserved - allocated) / GIB:.2f} GiB kept in reserve, "
            f"{free / GIB:.2f} of {total / GIB:.2f} GiB are free"
        )
    memory = psutil.virtual_memory()
    return (
        f"this process held up to {memory_bytes(device) / GIB:.2f} GiB, {memory.available / GIB:.2f} of "
        f"{memory.total / GIB:.2f} GiB of RAM are free"
    )


def _snapshot(folder: Path, rank: int, device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    path = folder / "profile" / f"rank_{rank:05d}_out_of_memory.pickle"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    except (OSError, RuntimeError):  # a failed snapshot must not hide the error that is reported
        return ""
    return f" (a snapshot is in {path}, for https://pytorch.org/memory_viz)"
