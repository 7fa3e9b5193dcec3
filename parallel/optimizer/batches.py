"""Stack equal rectangles of different matrices, so that one kernel serves many: a GPU spends its time, not the host.

A rank of many holds a few rows of every matrix, and most matrices of a model have the same shape in every layer. Large
rectangles are cut into chunks of rows, which are batches of one: views, and no copies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.optimizer.base import Update
from parallel.shards import Rectangle

AT_ONCE = {True: 2**26, False: 2**17}  # elements of a batch, by whether it is on a GPU; a CPU's fit its cache


@dataclass
class Places:
    """Place matrices in the flat tensors of all rows and of all columns, and in the list of logical tensors."""

    rows: dict[str, int]
    columns: dict[str, int]
    names: dict[str, int]


@dataclass
class Batch:
    """Hold K chunks [m, n] of different matrices; a place is a slice for one chunk, else numbers of elements."""

    numbers: list[int]
    """Of the updates that the chunks are part of."""
    first: int
    """First row of each chunk in its rectangle."""
    size: tuple[int, int]
    """Rows and columns of each chunk."""
    counted: bool
    rows: Tensor | slice
    columns: Tensor | slice
    names: Tensor | slice

    def stack(self, values: Sequence[Tensor]) -> Tensor:
        """Return the chunks of these rectangles as [k, m, n]: a view of the only one."""
        chunks = self.chunks(values)
        return chunks[0].unsqueeze(0) if len(chunks) == 1 else torch.stack(chunks)

    def chunks(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return the chunks of these rectangles, as views."""
        return [values[number][self.first : self.first + self.size[0]] for number in self.numbers]

    def take_columns(self, values: Tensor) -> Tensor:
        """Return [k, n] of a flat tensor of all columns."""
        return values[self.columns].view(-1, self.size[1])

    def take_rows(self, values: Tensor) -> Tensor:
        """Return [k, m] of a flat tensor of all rows."""
        return values[self.rows].view(-1, self.size[0])


class Listed:
    """The tensors that are updated as a list, because they are not factored: `sizes` are their elements."""

    def __init__(
        self, rectangles: Sequence[Rectangle], sizes: list[int], names: dict[str, int], device: torch.device
    ) -> None:
        """`names`: the number of each logical tensor."""
        numbers, self.sizes = [names[r.name] for r in rectangles], sizes
        self.counted = [i for i, r in enumerate(rectangles) if r.counted]
        self.numbers, self.repeats, self.counted_numbers = (
            on_device(values, device, torch.long) for values in (numbers, sizes, [numbers[i] for i in self.counted])
        )

    def add(self, sums: Tensor, values: Sequence[Tensor]) -> None:
        """Add to each logical tensor's sum the squares of the values that this rank counts."""
        if self.counted:
            squares = _squared_sums([values[i] for i in self.counted])
            sums.index_put_((self.counted_numbers,), squares, accumulate=True)

    def spread(self, values: Tensor) -> Tensor:
        """Return the value of its logical tensor for every element of the list."""
        return values[self.numbers].repeat_interleave(self.repeats, output_size=sum(self.sizes))


def on_device(numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return numbers of the host on a device, without a wait for it."""
    return to_device(torch.tensor(numbers, dtype=dtype), device)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device; the host waits for no GPU, because the source is page-locked."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def _squared_sums(tensors: list[Tensor]) -> Tensor:
    if tensors[0].is_cuda:
        return torch.stack(torch._foreach_norm(tensors)).square()
    return torch.stack([x.square().sum() for x in tensors])  # a CPU's norm sums one by one, with an error of 1e-5


def add_at(sums: Tensor, places: Tensor | slice, values: Tensor) -> None:
    """Add values to different places of a flat tensor; each takes one, so that the order of sums is fixed."""
    if isinstance(places, slice):
        sums[places] += values.flatten()
    else:
        sums.index_add_(0, places, values.flatten())


def make_batches(updates: Sequence[Update], places: Places) -> list[Batch]:
    """Group the chunks of two-dimensional updates that have one size, and are of different matrices."""
    open_: dict[tuple[int, int, int, bool], list[list[int]]] = {}
    for number, (r, weights, _) in enumerate(updates):
        most = AT_ONCE[weights.is_cuda]
        step = max(1, most // r.size[1])
        for first in range(0, r.size[0], step):
            rows = min(step, r.size[0] - first)
            groups = open_.setdefault((first, rows, r.size[1], r.counted), [])
            alike = most // (rows * r.size[1])
            fits = (g for g in groups if len(g) < alike and all(updates[n].rectangle.name != r.name for n in g))
            if (group := next(fits, None)) is None:
                groups.append([number])
            else:
                group.append(number)
    found = [(key, group) for key, groups in open_.items() for group in groups]
    return [_batch([updates[n].rectangle for n in group], group, key, places, updates[0].weights.device)
            for key, group in found]  # fmt: skip


def _batch(
    rectangles: Sequence[Rectangle], numbers: list[int], key: tuple[int, int, int, bool], places: Places,
    device: torch.device,
) -> Batch:  # fmt: skip
    first, rows, columns, counted = key
    starts = (
        [(places.rows[r.name] + r.offset[0] + first, rows) for r in rectangles],
        [(places.columns[r.name] + r.offset[1], columns) for r in rectangles],
        [(places.names[r.name], 1) for r in rectangles],
    )
    return Batch(numbers, first, (rows, columns), counted, *(_places(each, device) for each in starts))


def _places(ranges: Sequence[tuple[int, int]], device: torch.device) -> Tensor | slice:
    if len(ranges) == 1:
        ((start, number),) = ranges
        return slice(start, start + number)
    starts = torch.tensor([start for start, _ in ranges]).unsqueeze(1)
    return (starts + torch.arange(ranges[0][1])).flatten().to(device)
