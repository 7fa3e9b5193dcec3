"""Measure the seconds that this rank waits for others in collectives and messages.

Under gloo a wait blocks the process, so a clock measures it. Under NCCL it blocks a stream: events around it are read
once they have passed, so that measuring never waits for the device. Work of another stream (ZeRO's prefetching) does
not count.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

# A synchronous collective under NCCL runs in the caller's stream, within these calls.
NCCL_CALLS = ("allreduce", "_allgather_base", "allgather", "_reduce_scatter_base", "reduce_scatter", "reduce",
              "broadcast", "alltoall_base", "send", "recv")  # fmt: skip


class CommunicationWait:
    """Count waits from `__enter__` on; `seconds` returns those since its last call."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.waited_s = device, 0.0
        self.pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self.calls = threading.local()  # .depth: a wait inside a call counts once, in each thread
        self.original: dict[tuple[type, str], Any] = {}

    def __enter__(self) -> "CommunicationWait":
        """Wrap the methods that wait, for the whole process: torch 2.13 has no hook for waits."""
        self.thread = threading.get_ident()
        self._wrap(dist.Work, "wait")
        if self.device.type == "cuda":
            for name in NCCL_CALLS:
                self._wrap(dist.ProcessGroup, name)
        return self

    def __exit__(self, *_: object) -> None:
        for (owner, name), method in self.original.items():
            setattr(owner, name, method)
        self.original.clear()

    def seconds(self) -> float:
        """Return the seconds waited since the last call.

        On a GPU, waits whose events have not passed yet count in the next call.
        """
        while self.pending and self.pending[0][1].query():
            began, ended = self.pending.popleft()
            self.waited_s += began.elapsed_time(ended) / 1000
        waited, self.waited_s = self.waited_s, 0.0
        return waited

    def _wrap(self, owner: type, name: str) -> None:
        # The class holds a method that binds; getattr would return the bare function of pybind, which binds no more.
        self.original[owner, name] = vars(owner)[name]
        function = getattr(owner, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            with self._counted():
                return function(*arguments, **options)

        setattr(owner, name, counting)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        if getattr(self.calls, "depth", 0) or self._is_beside_the_step():
            yield
            return
        self.calls.depth = 1
        try:
            if self.device.type == "cuda":
                began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                began.record()
                yield
                ended.record()
                self.pending.append((began, ended))
            else:
                start = time.perf_counter()
                yield
                self.waited_s += time.perf_counter() - start
        finally:
            self.calls.depth = 0

    def _is_beside_the_step(self) -> bool:
        """Return whether the caller is another thread of Python (a checkpoint's) or another stream than the step's."""
        if threading.get_ident() == self.thread:
            own = True
        else:  # autograd's thread on a GPU is none of Python's -> Python makes a dummy for it
            own = self.device.type == "cuda" and isinstance(threading.current_thread(), threading._DummyThread)
        on_stream = self.device.type != "cuda" or torch.cuda.current_stream() == torch.cuda.default_stream()
        return not (own and on_stream)
