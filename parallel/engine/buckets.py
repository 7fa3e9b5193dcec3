"""Divide the trained parameters of some units over the data-parallel ranks: where each parameter lies in a flat bucket.

A bucket is a buffer of [rows, width] elements; each rank owns an equal range of it, its shard. One row holds all
parameters one after the other, so a shard begins and ends anywhere. As many rows as ranks hold each parameter's pieces
in one column range, which is how DeepSpeed's ZeRO-3 divides: every parameter by itself.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.layers import parameter_info
from parallel.plan.buckets import joined
from parallel.shards import is_counted


class Piece(NamedTuple):
    """A rank's share of a flattened parameter: its first element, their number, their start in the shard."""

    first: int
    size: int
    start: int


class Bucket:
    """The layout of some parameters over `ranks` ranks, and this rank's fp32 weights and gradient of them."""

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: int, rank: int, divided: bool) -> None:
        """Lay out the parameters; `divided`: each is divided by itself."""
        self.parameters, self.ranks, self.rank = list(parameters), ranks, rank
        self.divided, self.rows = divided, ranks if divided else 1
        self.sizes = [num_elements(p) for p in self.parameters]
        self.counts = [-(-size // self.rows) for size in self.sizes]
        self.starts = [sum(self.counts[:i]) for i in range(len(self.counts))]
        self.shard_size = -(-sum(self.counts) * self.rows // ranks)
        self.weights = torch.empty(0)
        self.gradient: Tensor | None = None
        self.flat = torch.empty(0)  # the memory of all parameters, where they are whole

    @property
    def numel(self) -> int:
        """Return the elements of the whole buffer, with those that pad it."""
        return self.shard_size * self.ranks

    def pieces(self) -> list[Piece]:
        """Return this rank's share of every parameter; its size may be 0."""
        found = []
        for size, count, start in zip(self.sizes, self.counts, self.starts, strict=True):
            if self.divided:
                first = min(self.rank * count, size)
                found.append(Piece(first, min(count, size - first), start))
                continue
            low = max(start, self.rank * self.shard_size)
            end = min(start + size, (self.rank + 1) * self.shard_size)
            found.append(Piece(low - start, max(0, end - low), low - self.rank * self.shard_size))
        return found

    def placed(self) -> list[tuple[nn.Parameter, Piece]]:
        """Return every parameter with this rank's share of it."""
        return list(zip(self.parameters, self.pieces(), strict=True))

    def take_gradient(self) -> Tensor:
        """Return this rank's summed gradient, and forget it."""
        assert self.gradient is not None
        gradient, self.gradient = self.gradient, None
        return gradient

    def publish_shards(self) -> None:
        """Copy the fp32 weights into the shards of the parameters that DeepSpeed gathers from."""
        shards, weights = [], []
        for parameter, (_, count, start) in self.placed():
            held: Any = parameter
            shards.append(held.ds_tensor.data[:count])
            weights.append(self.weights[start : start + count])
        torch._foreach_copy_(shards, weights)

    def fill(self, buffer: Tensor, number: int, values: Tensor, add: bool) -> None:
        """Write a whole parameter's values into its place of the buffer, or add them to what lies there."""
        size, count = self.sizes[number], self.counts[number]
        place, values = self._place(buffer, number), values.flatten()
        rows = size // count
        pairs = [(place[:rows], values[: rows * count].view(rows, count))]
        if size % count:
            pairs.append((place[rows, : size % count], values[rows * count :]))
        for where, given in pairs:
            where.add_(given) if add else where.copy_(given)

    def whole(self, buffer: Tensor, number: int) -> Tensor:
        """Return a whole flattened parameter's values: a view of the buffer where it has one row."""
        return self._place(buffer, number).reshape(-1)[: self.sizes[number]]

    def clear(self, buffer: Tensor, number: int) -> None:
        """Set a parameter's place to zero."""
        self._place(buffer, number).zero_()

    def _place(self, buffer: Tensor, number: int) -> Tensor:
        start = self.starts[number]
        return buffer.view(self.rows, -1)[:, start : start + self.counts[number]]

    def counted_ranges(self, tensor_parallel_rank: int) -> list[slice]:
        """Return ranges of the shard that this rank counts in the gradient norm; neighbors are joined."""
        ranges: list[slice] = []
        for parameter, (_, count, start) in zip(self.parameters, self.pieces(), strict=True):
            if count == 0 or not is_counted(parameter, tensor_parallel_rank):
                continue
            joined = bool(ranges) and ranges[-1].stop == start
            ranges.append(slice(ranges.pop().start if joined else start, start + count))
        return ranges

    def copies(self) -> list[tuple[Tensor, bool]]:
        """Return this rank's summed gradients of parameters that every tensor-parallel rank holds whole, as views.

        The second value is whether each tensor-parallel rank has a part of the gradient's sum.
        """
        assert self.gradient is not None
        infos = [(parameter_info(p), piece) for p, piece in self.placed()]
        return [
            (self.gradient[start : start + size], info.partial_gradient)
            for info, (_, size, start) in infos
            if size and not info.split
        ]


def is_divided(parameter: nn.Parameter) -> bool:
    """Return whether ZeRO-3 has left a shard of the parameter on this rank."""
    return hasattr(parameter, "ds_tensor")


def num_elements(parameter: Any) -> int:
    """Return the elements of a whole parameter, also where ZeRO-3 left a shard of it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def make_buckets(units: Sequence[Sequence[nn.Parameter]], ranks: int, rank: int) -> list[Bucket]:
    """Join the parameters of consecutive units into buckets, last unit first: the order of a backward pass.

    Sharded parameters and whole ones have buckets of their own.
    """
    found: list[tuple[int, Bucket]] = []
    for divided in (False, True):
        chosen = [[p for p in unit if is_divided(p) == divided] for unit in units]
        for numbers in joined([sum(map(num_elements, own)) for own in chosen]):
            found.append((numbers[-1], Bucket([p for n in numbers for p in chosen[n]], ranks, rank, divided)))
    return [bucket for _, bucket in sorted(found, key=lambda each: -each[0])]
