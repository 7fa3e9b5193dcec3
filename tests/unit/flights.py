"""Follow collectives from their start to their wait, and find a race without a GPU.

On a GPU a collective with `async_op` runs in a stream of its process group: the stream that computes goes on, and waits
for it in `Work.wait`. Until then its output must not be used, its input must not be written, and the memory of both
must stay. Without `async_op` a collective runs in the stream that computes, and nothing is computed beside it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.parallel.traffic import METHODS

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}


@dataclass
class Flight:
    """One collective on its way: its kind, group, and memory, and the matrix products that have begun since."""

    kind: str
    group: str
    outputs: list[StorageWeakRef]
    inputs: list[StorageWeakRef]
    dtype: torch.dtype
    products: int = 0
    work: Any = field(default=None, repr=False)


class Flights(TorchDispatchMode):
    """Record every collective that has a stream of its own, and raise AssertionError at a race."""

    def __init__(self) -> None:
        super().__init__()
        self.flying: list[Flight] = []
        self.landed: list[Flight] = []
        self.in_the_way: list[Flight] = []  # collectives in the stream that computes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator that touches nothing in flight."""
        name = func.__name__.split(".")[0]
        for flight in self.flying:
            flight.products += name in PRODUCTS
        if func.namespace != "c10d" and not _is_view(func):
            self._check(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _check(self, func: Any, args: Any, kwargs: Any) -> None:
        for argument, value in _named(func, args, kwargs):
            written = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves(value):
                if not isinstance(tensor, Tensor):
                    continue
                own = StorageWeakRef(tensor.untyped_storage())
                for flight in self.flying:
                    assert own not in flight.outputs, f"{func} uses the result of a {flight.kind} before it is here"
                    assert not (written and own in flight.inputs), f"{func} writes what a {flight.kind} still reads"

    def start(self, kind: str, group: dist.ProcessGroup, arguments: Any, work: Any) -> None:
        """Record a collective with its arguments as a process group takes them: outputs first, then inputs."""
        options = [each for each in arguments if hasattr(each, "asyncOp")]
        outputs, inputs = ([], arguments[:1]) if kind == "message" else (arguments[:1], arguments[1:])
        tensors = [[x for x in tree_leaves(list(given)) if isinstance(x, Tensor)] for given in (outputs, inputs)]
        memory = [[StorageWeakRef(x.untyped_storage()) for x in given] for given in tensors]
        flight = Flight(kind, group.group_name, *memory, (*tensors[0], *tensors[1])[0].dtype, work=work)
        beside = kind == "message" or (options and options[0].asyncOp)
        (self.flying if beside else self.in_the_way).append(flight)

    def wait(self, work: Any) -> None:
        """End the flight of a collective."""
        for flight in [flight for flight in self.flying if flight.work is work]:
            lost = [ref for ref in flight.outputs + flight.inputs if ref.expired()]
            assert not lost, f"memory of a {flight.kind} is free before it has ended"
            self.flying.remove(flight)
            self.landed.append(flight)


def _named(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    for argument, value in zip(func._schema.arguments, args, strict=False):
        yield argument, value
    names = {argument.name: argument for argument in func._schema.arguments}
    for name, value in kwargs.items():
        yield names[name], value


def _is_view(func: Any) -> bool:
    """Return whether results share memory with an argument that stays as it is: only its shape is read."""
    return any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)


@contextmanager
def followed() -> Iterator[Flights]:
    """Follow the collectives of this process within the context."""
    flights = Flights()
    own = vars(dist.ProcessGroup)
    bound = {(dist.ProcessGroup, method): own[method] for method in METHODS if method in own}
    bound |= {(kind, "wait"): vars(kind)["wait"] for kind in (dist.Work, FakeWork)}

    def wrap(method: str) -> Callable[..., Any]:
        original, kind = getattr(dist.ProcessGroup, method), METHODS[method][0]

        def starting(group: dist.ProcessGroup, *arguments: Any, **options: Any) -> Any:
            work = original(group, *arguments, **options)
            if group.size() > 1:
                flights.start(kind, group, (*arguments, *options.values()), work)
            return work

        return starting

    def wrap_wait(kind: type) -> Callable[..., Any]:
        original = kind.wait  # type: ignore[attr-defined]

        def waiting(work: Any, *arguments: Any) -> Any:
            flights.wait(work)
            return original(work, *arguments)

        return waiting

    wrapped = {(owner, name): wrap_wait(owner) if name == "wait" else wrap(name) for owner, name in bound}
    for (owner, name), function in wrapped.items():
        setattr(owner, name, function)
    try:
        with flights:
            yield flights
    finally:
        for (owner, name), function in bound.items():
            setattr(owner, name, function)
