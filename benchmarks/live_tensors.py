"""Count the bytes of live tensors and the collectives of a block of code, below autograd and every library.

Each operator that torch dispatches is seen once it has run: the memory of its results counts until it is freed, by
whatever holds it. Memory that an operator frees before it returns is not seen.
"""

import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# operator -> (kind, index of the argument that holds the whole tensors)
COLLECTIVES = {
    "allreduce_": ("all-reduce", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "send": ("message", 0),
}
RECEIVED = ("recv_", "recv_any_source_")  # the other half of a message
MADE_EMPTY = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided")


@dataclass(frozen=True)
class Collective:
    """One kind of collective over groups of one size."""

    kind: str
    group_size: int


class LiveTensors(TorchDispatchMode):
    """Count while the `with` statement lasts; `peak` is the most bytes at once since `reset_peak`.

    `zero`: new memory that torch leaves unwritten is filled with zeros, so that values of a fake process group are
    finite.
    """

    def __init__(self, zero: bool = False) -> None:
        super().__init__()
        self.zero = zero
        self.live = self.peak = 0
        self.seen: dict[int, weakref.ref[Any]] = {}
        self.calls: Counter[Collective] = Counter()
        self.sent: Counter[Collective] = Counter()

    def reset_peak(self) -> None:
        """Begin a new peak at the bytes that live now, and count collectives anew."""
        self.peak = self.live
        self.calls.clear()
        self.sent.clear()

    def add(self, x: Tensor) -> None:
        """Count the memory of a tensor, once however many tensors share it; a plan on `meta` has none."""
        if x.device.type == "meta":
            return
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self.seen.get(key)
        if known is not None and known() is storage:
            return
        self.seen[key] = weakref.ref(storage, lambda _: self._free(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        self.seen.pop(key, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, then count it."""
        name = func.name()
        if func.namespace == "c10d":
            self._count(name.partition("::")[2].partition(".")[0], args)
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                if self.zero and name.partition(".")[0] in MADE_EMPTY and x.is_floating_point():
                    x.zero_()
                self.add(x)
        return result

    def _count(self, name: str, args: Any) -> None:
        if name in RECEIVED:
            return
        kind, whole = COLLECTIVES.get(name, (name, -1))
        boxed = [x for x in args if isinstance(x, torch.ScriptObject)]
        groups = [x for x in map(_unboxed, boxed) if x is not None]
        size = groups[0].size() if groups else 0
        if size == 1:
            return
        key = Collective(kind, size)
        self.calls[key] += 1
        if whole >= 0:
            self.sent[key] += sum(
                x.numel() * x.element_size() for x in tree_leaves(args[whole]) if isinstance(x, Tensor)
            )


def _unboxed(x: Any) -> dist.ProcessGroup | None:
    try:
        return dist.ProcessGroup.unbox(x)
    except (RuntimeError, TypeError):
        return None  # another object, such as the operator of a reduction
