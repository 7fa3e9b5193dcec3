"""Count the bytes that a rank sends in collectives and messages of torch.distributed, by kind and by group.

A collective counts as on a ring, which is the least that a rank must send: 2 (n - 1) / n of an all-reduce's bytes,
(n - 1) / n of the whole of an all-gather or a reduce-scatter, all of a message. A broadcast counts on its source rank.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

# method of a process group -> (kind, number of the argument that holds the whole tensors, share sent by one of n ranks)
METHODS: dict[str, tuple[str, int, Callable[[int], float]]] = {
    "allreduce": ("all-reduce", 0, lambda n: 2 * (n - 1) / n),
    "all_gather_single": ("all-gather", 0, lambda n: (n - 1) / n),  # torch 2.13's name of the next one
    "_allgather_base": ("all-gather", 0, lambda n: (n - 1) / n),
    "allgather": ("all-gather", 0, lambda n: (n - 1) / n),
    "reduce_scatter_single": ("reduce-scatter", 1, lambda n: (n - 1) / n),  # and of this one
    "_reduce_scatter_base": ("reduce-scatter", 1, lambda n: (n - 1) / n),
    "reduce_scatter": ("reduce-scatter", 1, lambda n: (n - 1) / n),
    "reduce": ("reduce", 0, lambda n: (n - 1) / n),
    "broadcast": ("broadcast", 0, lambda n: 1.0),
    "send": ("message", 0, lambda n: 1.0),
}


@contextmanager
def counted(names: Mapping[str, dist.ProcessGroup]) -> Iterator[Counter[tuple[str, str]]]:
    """Count bytes sent by this rank, by (group's name, kind), while the context lasts; other groups are "other"."""
    sent: Counter[tuple[str, str]] = Counter()
    known = {group.group_name: name for name, group in reversed(names.items())}
    own = vars(dist.ProcessGroup)  # what is bound there: to put back what `getattr` gives would lose `self`
    bound = {method: own[method] for method in METHODS if method in own}

    def wrap(method: str) -> Callable[..., Any]:
        original, (kind, whole, share) = getattr(dist.ProcessGroup, method), METHODS[method]

        def counting(group: dist.ProcessGroup, *arguments: Any, **options: Any) -> Any:
            if group.size() > 1 and not (kind == "broadcast" and _root(arguments) != group.rank()):
                sent[known.get(group.group_name, "other"), kind] += share(group.size()) * _bytes(arguments[whole])
            return original(group, *arguments, **options)

        return counting

    for method in bound:
        setattr(dist.ProcessGroup, method, wrap(method))
    try:
        yield sent
    finally:
        for method, function in bound.items():
            setattr(dist.ProcessGroup, method, function)


def _bytes(x: Any) -> int:
    return x.numel() * x.element_size() if isinstance(x, Tensor) else sum(map(_bytes, x))


def _root(arguments: tuple[Any, ...]) -> int:
    return int(getattr(arguments[1], "rootRank", 0)) if len(arguments) > 1 else 0
