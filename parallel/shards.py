"""How the flat memory of a shard maps to logical tensors: as rectangles.

ZeRO hands the optimizer one-dimensional slices of tensor-parallel blocks. Elements that are consecutive in a row-major
block are at most three rectangles of it: the rest of a row, whole rows, the beginning of a row. Optimizers and
checkpoints see only these.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.layers import Part, parameter_info


@dataclass(frozen=True)
class Rectangle:
    """A contiguous piece of a flat tensor that is a rectangle of a logical tensor (1-D: a stretch of it).

    Elements [start, start + numel) of the flat tensor are the `size` elements at `offset` of the logical tensor `name`
    of `shape`. `once`: of all tensor-parallel ranks that hold these same elements, this one counts them in sums.
    """

    name: str
    shape: torch.Size
    offset: tuple[int, ...]
    size: torch.Size
    start: int
    once: bool

    @property
    def slices(self) -> tuple[slice, ...]:
        """The rectangle as an index into the logical tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.size, strict=True))

    def view(self, flat: Tensor) -> Tensor:
        """The rectangle in a flat tensor (shares its memory)."""
        return flat[self.start : self.start + self.size.numel()].view(self.size)


def rectangles(parts: Iterable[Part], first: int, count: int, start: int, once: bool) -> list[Rectangle]:
    """Elements [first, first + count) of a flattened parameter made of `parts`, which lie at `start` of a flat
    tensor."""
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
                Rectangle(part.name, part.shape, offset, torch.Size(size[-dimensions:]), start + at - first, once)
            )
            at += found[-1].size.numel()
    return found


def count_once(parameter: nn.Parameter, tensor_parallel_rank: int) -> bool:
    """Whether this rank counts the parameter's elements in sums over the tensor-parallel group."""
    return parameter_info(parameter).split or tensor_parallel_rank == 0
