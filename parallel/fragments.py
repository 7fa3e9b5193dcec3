"""How the flat memory of a shard maps to logical tensors: as rectangles.

ZeRO hands the optimizer one-dimensional slices of tensor-parallel blocks. Elements that are consecutive in a row-major block
are at most three rectangles of it: the rest of a row, whole rows, the beginning of a row. Optimizers and checkpoints see only these.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.layers import Part


@dataclass(frozen=True)
class Rectangle:
    """A contiguous piece of a flat tensor that is a rectangle of a logical tensor (1-D: of one row of it).

    Elements [start, start + rows * columns) of the flat tensor are `size` elements at `offset` of the logical tensor `name` of `shape`.
    `once`: of all tensor-parallel ranks that hold these same elements, this one counts them in sums.
    """

    name: str
    shape: torch.Size
    offset: tuple[int, ...]
    size: tuple[int, ...]
    start: int
    once: bool

    @property
    def numel(self) -> int:
        return torch.Size(self.size).numel()

    def view(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.start + self.numel].view(self.size)


def rectangles(part: Part, first: int, count: int, start: int, once: bool) -> list[Rectangle]:
    """The elements of `part` among [first, first + count) of its parameter, which lie at `start` of a flat tensor."""
    begin, end = max(first, part.start), min(first + count, part.start + part.block.numel())
    columns = part.block[-1] if part.block else 1
    found, at = [], begin
    while at < end:
        row, column = divmod(at - part.start, columns)
        rows = (end - at) // columns if column == 0 else 0
        width = columns if rows else min(columns - column, end - at)
        size = (max(rows, 1), width)[-len(part.block):] if part.block else ()
        offset = tuple(o + i for o, i in zip(part.offset, (row, column)[-len(part.block):], strict=True)) if part.block else ()
        found.append(Rectangle(part.name, part.shape, offset, size, start + at - first, once))
        at += max(rows, 1) * width
    return found


def whole_parameter(parameter: nn.Parameter, parts: Iterable[Part], first_rank: bool) -> list[Rectangle]:
    """All elements of a parameter, flattened; `first_rank`: this is tensor-parallel rank 0."""
    once = parameter.split or first_rank  # type: ignore[attr-defined]
    return [r for part in parts for r in rectangles(part, 0, parameter.numel(), 0, once)]
