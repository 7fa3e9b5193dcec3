"""Map the flat memory of a shard to rectangles of logical tensors.

ZeRO gives the optimizer one-dimensional slices of tensor-parallel blocks. Consecutive elements of a row-major block are
at most three rectangles of it: the rest of a row, whole rows, the beginning of a row. Optimizers and checkpoints handle
these rectangles alone, so they are independent of the layout.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.layers import Part, parameter_info
from parallel.config import ParallelConfig


@dataclass(frozen=True)
class Rectangle:
    """Place a contiguous part of a flat tensor in a logical tensor, as a rectangle (1-D: a range) of it.

    Elements [start, start + size.numel()) of the flat tensor are the `size` elements at `offset` of the logical tensor
    `name` of `shape`. `counted`: this rank contributes the elements to sums over the tensor-parallel group; exactly one
    of the ranks that hold the same elements does.
    """

    name: str
    shape: torch.Size
    offset: tuple[int, ...]
    size: torch.Size
    start: int
    counted: bool

    @property
    def slices(self) -> tuple[slice, ...]:
        """The rectangle as an index into the logical tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.size, strict=True))

    def view(self, flat: Tensor) -> Tensor:
        """Return the rectangle as a view of the flat tensor."""
        return flat[self.start : self.start + self.size.numel()].view(self.size)


def rectangles(parts: Iterable[Part], first: int, count: int, start: int, counted: bool) -> list[Rectangle]:
    """Return the rectangles of elements [first, first + count) of a flattened parameter that consists of `parts`.

    The elements lie at `start` of a flat tensor.
    """
    found = []
    for part in parts:
        at, end = max(first, part.start), min(first + count, part.start + part.block.numel())
        dimensions, columns = len(part.block), part.block[-1]
        while at < end:
            row, column = divmod(at - part.start, columns)
            rows = (end - at) // columns if column == 0 else 0
            size = (rows, columns) if rows else (1, min(columns - column, end - at))
            offset = tuple(o + i for o, i in zip(part.offset, (row, column)[-dimensions:], strict=True))
            found.append(
                Rectangle(part.name, part.shape, offset, torch.Size(size[-dimensions:]), start + at - first, counted)
            )
            at += found[-1].size.numel()
    return found


def is_sharded(elements: int, trained: bool, config: ParallelConfig) -> bool:
    """Return whether ZeRO-3 shards a parameter of a rank: a large one, and a frozen one with `shard_frozen` only."""
    return elements > config.param_persistence_threshold and (trained or config.shard_frozen)


def is_counted(parameter: nn.Parameter, tensor_parallel_rank: int) -> bool:
    """Return whether this rank contributes the parameter's elements to sums over the tensor-parallel group."""
    return parameter_info(parameter).split or tensor_parallel_rank == 0
