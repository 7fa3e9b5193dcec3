"""Keep the inputs of cheap operators instead of their results: the backward pass computes the results again.

A matrix product keeps its input for the gradient of its weights. Where that input comes from an activation or a norm,
it is as large as what it was made of, which is kept anyway. torch's `checkpoint` of both would run the product again,
with its collectives; here only the cheap operator runs again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def recomputed(result: Tensor, make: Callable[[], Tensor], reader: nn.Module) -> Iterator[None]:
    """Within the context, let autograd keep `make` where it would keep `result`, or a view of it.

    `reader` is the module that runs in the context. Its parameters are kept as parameters: the engine may free their
    memory after the forward pass and fill it again before the backward pass, and a copy would hold it.
    """
    storage = result.untyped_storage()._cdata
    parameters = {p.untyped_storage()._cdata: p for p in reader.parameters(recurse=False)}

    def pack(x: Tensor) -> Any:
        own = x.untyped_storage()._cdata
        view = x.shape, x.stride(), x.storage_offset()
        if own == storage:
            return make, view
        return (parameters[own].detach, view) if own in parameters else x

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        again, view = kept
        with torch.no_grad():
            return again().as_strided(*view)  # type: ignore[no-any-return]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class GatedGELU(torch.autograd.Function):
    """gelu(gate) * up, T5's activation, with the tanh form; keeps gate and up only."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        """Gate and up [..., f] -> [..., f]."""
        ctx.save_for_backward(gate, up)
        return gated_gelu(gate, up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the gradients of gate and up."""
        return gated_gelu_backward(gradient, *ctx.saved_tensors)


def gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute gelu(gate) * up, in one kernel on a GPU."""
    return (_compiled(_gated_gelu) if gate.is_cuda else _gated_gelu)(gate, up)


def gated_gelu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of gate and up, in one kernel on a GPU."""
    return (_compiled(_gated_gelu_backward) if gate.is_cuda else _gated_gelu_backward)(gradient, gate, up)


def _gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def _gated_gelu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    of_gate = torch.ops.aten.gelu_backward(gradient * up, gate, approximate="tanh")
    return of_gate, gradient * F.gelu(gate, approximate="tanh")


_made: dict[Callable[..., Any], Callable[..., Any]] = {}


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as one kernel for any shape, compiled once in a process."""
    if function not in _made:
        _made[function] = torch.compile(function, dynamic=True, fullgraph=True)
    return _made[function]
