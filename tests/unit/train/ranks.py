"""Several ranks in one process: each is a thread, and collectives are sums and lists in memory."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist

Result = TypeVar("Result")
DEADLINE_S = 60


class Ranks:
    """Replace the world of `torch.distributed`; `calls` counts each collective once, whatever the number of ranks."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.size, self.calls = size, dict[str, int]()
        self.own = threading.local()
        self.barrier = threading.Barrier(size)
        self.sent: list[Any] = [None] * size
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda group=None: size)
        monkeypatch.setattr(dist, "get_rank", lambda group=None: self.own.rank)
        monkeypatch.setattr(dist, "all_reduce", self.all_reduce)
        monkeypatch.setattr(dist, "all_gather_object", self.all_gather_object)
        monkeypatch.setattr(dist, "gather_object", self.gather_object)
        monkeypatch.setattr(dist, "broadcast_object_list", self.broadcast_object_list)

    def run(self, function: Callable[[int], Result]) -> list[Result | BaseException]:
        """Return the result or the error of `function(rank)` of every rank."""
        results: list[Result | BaseException] = [RuntimeError("it never ended")] * self.size

        def body(rank: int) -> None:
            self.own.rank = rank
            try:
                results[rank] = function(rank)
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        return results

    def all_reduce(
        self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        everyone = torch.stack(self._exchange("all_reduce", tensor.clone()))
        tensor.copy_(everyone.amax(0) if op == dist.ReduceOp.MAX else everyone.sum(0))
        return SimpleNamespace(wait=lambda: None) if async_op else None

    def all_gather_object(self, into: list[Any], item: Any, group: Any = None) -> None:
        into[:] = self._exchange("all_gather_object", item)

    def gather_object(self, item: Any, into: list[Any] | None = None, dst: int = 0, group: Any = None) -> None:
        everyone = self._exchange("gather_object", item)
        assert (into is not None) == (self.own.rank == dst)
        if into is not None:
            into[:] = everyone

    def broadcast_object_list(self, items: list[Any], src: int = 0, **_: Any) -> None:
        items[:] = self._exchange("broadcast_object_list", list(items))[src]

    def _exchange(self, name: str, item: Any) -> list[Any]:
        self.sent[self.own.rank] = item
        if self.barrier.wait(DEADLINE_S) == 0:
            self.calls[name] = self.calls.get(name, 0) + 1
        everyone = list(self.sent)
        self.barrier.wait(DEADLINE_S)
        return everyone


def group(rank: int = 0, size: int = 1) -> Any:
    """A group that sends tensors of the host, as far as a reduction reads it."""
    return SimpleNamespace(rank=lambda: rank, size=lambda: size, _device_types=[torch.device("cpu")])


def layout(rank: int = 0, world_size: int = 1) -> Any:
    """A rank's layout, as far as a reduction reads it; each rank is a replica."""
    groups = SimpleNamespace(replica=group(), leaders=group(rank, world_size))
    return SimpleNamespace(
        rank=rank,
        world_size=world_size,
        data_parallel_rank=rank,
        data_parallel_size=world_size,
        device=torch.device("cpu"),
        is_replica_leader=True,
        reading_groups=groups,
        background_reading_groups=groups,
    )
