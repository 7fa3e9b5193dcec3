"""Packed rows taken apart for attention: every example in a row of its own, no score between two of them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Move:
    """Positions moved: position i of the result, an [L, B] flattened, comes from `source[i]` (int64).

    Those at `empty` come from nowhere, and are zero.
    """

    shape: tuple[int, int]
    source: Tensor
    empty: Tensor

    @classmethod
    def of(cls, shape: tuple[int, int], source: Tensor, target: Tensor) -> "Move":
        """From the positions `source` to the positions `target` of a result of that shape."""
        sources = source.new_full((shape[0] * shape[1],), -1)
        sources[target] = source
        return cls(shape, sources.clamp(min=0), (sources < 0).nonzero().squeeze(1))

    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, self.source).index_fill_(0, self.empty, 0).unflatten(0, self.shape)


@dataclass(frozen=True)
class Side:
    """The queries or the keys of packed rows, there and back; `segments` int64 [E, longest]: 1, or 0 where padded."""

    segments: Tensor
    apart: Move
    together: Move

    @classmethod
    def of(cls, segments: Tensor, first: Tensor, num_examples: int) -> "Side":
        """From segment ids [B, L]; `first` [B]: the number of each row's first example among all `num_examples`."""
        rows, length = segments.shape
        packed = (segments.t().flatten() > 0).nonzero().squeeze(1)
        example = (first + segments.t() - 1).flatten()[packed]
        order = example.argsort(stable=True)
        packed, example = packed[order], example[order]
        sizes = example.bincount(minlength=num_examples)
        longest = int(sizes.amax())
        place = torch.arange(len(example)) - (sizes.cumsum(0) - sizes)[example]
        alone = place * num_examples + example
        return cls(
            (torch.arange(longest) < sizes.unsqueeze(1)).long(),
            Move.of((longest, num_examples), packed, alone),
            Move.of((length, rows), alone, packed),
        )

    def unpack(self, x: Tensor) -> Tensor:
        """[L, B, ...] -> [longest, E, ...]."""
        return _Moved.apply(x, self.apart, self.together)  # type: ignore[no-any-return]

    def repack(self, x: Tensor) -> Tensor:
        """[longest, E, ...] -> [L, B, ...], zeros where a row has no example."""
        return _Moved.apply(x, self.together, self.apart)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Unpacking:
    """The examples of packed rows, one per row."""

    queries: Side
    keys: Side

    @classmethod
    def of(cls, queries: Tensor, keys: Tensor) -> "Unpacking | None":
        """Of segment ids [B, Lq] and [B, Lk] on the host; None if that does not make the scores a quarter fewer."""
        in_row = torch.maximum(queries.amax(1), keys.amax(1))
        num_examples = int(in_row.sum())
        if num_examples == 0:
            return None
        sides = [Side.of(segments, in_row.cumsum(0) - in_row, num_examples) for segments in (queries, keys)]
        scores = num_examples * sides[0].segments.shape[1] * sides[1].segments.shape[1]
        return cls(*sides) if 0 < scores <= 0.75 * queries.numel() * keys.shape[1] else None


class _Moved(torch.autograd.Function):
    """A position goes to one place at most, so its gradient just goes back: nothing is summed up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Move, back: Move) -> Tensor:  # type: ignore[override]
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.back(grad), None, None
