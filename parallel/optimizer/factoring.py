"""Choose what Adafactor's second moments are means over: the sides of a matrix, or those of each of its blocks.

T5X (`t5x/adafactor.py`: `_factored_dims`, `standard_logical_factor_rules`) factors the two sides of a matrix [inputs,
outputs]. Its T5 stores attention kernels so, and its rules join the axes `heads` and `kv` of any other.

big_vision (`optax.scale_by_factored_rms`, optax 0.2.8 `_factored_dims`) factors the two largest dimensions of a kernel
as flax shapes it. The kernel [width, heads, head width] of a ViT is one matrix for each head; that of the patches,
[patch, patch, 3, width], one for each row of pixels and color, if a side of a patch is large enough at all.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.weights.big_vision import Layout
from parallel.config import OptimizerConfig


class Grid:
    """Divide a matrix [R, C] into r x c blocks of equal size with means of their own; by default it is one block.

    The means are those of rows, [c, R], and of columns, [r, C]; without the first dimension if there is one block.
    `row_blocks` int64 [R] and `column_blocks` int64 [C] number the block of each row and column.
    """

    def __init__(self, row_blocks: Tensor, column_blocks: Tensor) -> None:
        self.row_blocks, self.column_blocks = row_blocks, column_blocks
        self.num_rows, self.num_columns = (int(blocks.max()) + 1 for blocks in (row_blocks, column_blocks))
        self.whole = self.num_rows == self.num_columns == 1

    @classmethod
    def from_shape(cls, shape: torch.Size, layout: Layout | None, config: OptimizerConfig) -> "Grid | None":
        """Return the blocks of a logical tensor, None if all of its second moments are kept.

        `layout`: its dimensions in flax, if they are not its own two. Where big_vision's two dimensions are parts of
        one of ours, moments are kept whole: that is a bias [heads, head width] with at least `min_dim_size_to_factor`
        of both, which none of its ViTs has.
        """
        if len(shape) != 2:
            return None
        columns = shape[1]
        dims = layout if layout and config.factoring == "big_vision" else ((shape[0], columns), (columns, 1))
        *others, second, largest = sorted(dims, key=lambda dim: dim[0])
        sides = [[dim for dim in dims if (dim[1] >= columns) == is_row] for is_row in (True, False)]
        if second[0] < config.min_dim_size_to_factor or (second in sides[0]) == (largest in sides[0]):
            return None
        kept = [[dim for dim in side if dim in others] for side in sides]
        return cls(_blocks(shape[0], kept[0], columns), _blocks(columns, kept[1], 1))

    def to(self, device: torch.device) -> "Grid":
        """Return the grid with its numbers of blocks on a device."""
        self.row_blocks, self.column_blocks = self.row_blocks.to(device), self.column_blocks.to(device)
        return self

    @property
    def sizes(self) -> tuple[torch.Size, torch.Size]:
        """Shapes of the means of rows and of columns."""
        rows, columns = len(self.row_blocks), len(self.column_blocks)
        if self.whole:
            return torch.Size((rows,)), torch.Size((columns,))
        return torch.Size((self.num_columns, rows)), torch.Size((self.num_rows, columns))

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block: the numbers of elements that a mean of columns, and of rows, is over."""
        return len(self.row_blocks) // self.num_rows, len(self.column_blocks) // self.num_columns

    def add(self, squares: Tensor, rows: slice, columns: slice, sums: tuple[Tensor, Tensor]) -> None:
        """Add squares of the elements [rows, columns] to the sums of rows and of columns, both flat."""
        row_sums, column_sums = (x.view(size) for x, size in zip(sums, self.sizes, strict=True))
        if self.whole:
            row_sums[rows] += squares.sum(1)
            column_sums[columns] += squares.sum(0)
            return
        row_sums[:, rows] += _one_hot(self.column_blocks[columns], self.num_columns).t() @ squares.t()
        column_sums[:, columns] += _one_hot(self.row_blocks[rows], self.num_rows).t() @ squares

    def factors(self, row_means: Tensor, column_means: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors (of rows, of columns) by which elements of a gradient are scaled, of the means' shapes."""
        if self.whole:
            return (row_means / row_means.mean()).rsqrt(), column_means.rsqrt()
        by_block = row_means @ _one_hot(self.row_blocks, self.num_rows) / self.block[0]  # [c, r]
        return (row_means / by_block[:, self.row_blocks]).rsqrt(), column_means.rsqrt()

    def scale(self, rows: slice, columns: slice, factors: tuple[Tensor, Tensor]) -> Tensor:
        """Return the product of both factors for the elements [rows, columns]; of a matrix of several blocks."""
        of_rows, of_columns = factors
        by_row = of_rows[:, rows][self.column_blocks[columns]].t()
        return by_row * of_columns[self.row_blocks[rows]][:, columns]


def _blocks(length: int, dims: Sequence[tuple[int, int]], unit: int) -> Tensor:
    """Return the block of each of `length` rows or columns: the number that its places in these dimensions make."""
    found, places = torch.zeros(length, dtype=torch.long), torch.arange(length)
    for size, stride in dims:
        found = found * size + places // (stride // unit) % size
    return found


def _one_hot(blocks: Tensor, number: int) -> Tensor:
    return F.one_hot(blocks, number).float()
