"""Attention example by example, for CPUs: packed rows are split so that no score lies between two examples.

    packed rows, segment ids            examples, one per row, in classes of similar length
    1 1 1 1 2 2 0   (A, B)               A A A A     B B
    1 1 2 2 2 2 2   (C, D)      ->       D D D D D   C C

`Examples` decides whether that is worth it, `Unpacking` moves positions there and back.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.attention.bias import WIDTH

WORTH_A_CLASS = 2**16  # scores; a second class that saves fewer costs more in operator calls than it saves


@dataclass(frozen=True)
class Move:
    """A copy of positions: position i of the result is position `source[i]` (int64).

    The positions `empty` (int64) of the result are zero.
    """

    source: Tensor
    empty: Tensor

    @classmethod
    def from_positions(cls, length: int, source: Tensor, target: Tensor) -> "Move":
        """Copy the positions `source` to the positions `target` of a result of that length."""
        sources = source.new_full((length,), -1)
        sources[target] = source
        return cls(sources.clamp(min=0), (sources < 0).nonzero().squeeze(1))

    def __call__(self, x: Tensor) -> Tensor:
        """[positions, ...] -> [length, ...]."""
        return x.index_select(0, self.source).index_fill_(0, self.empty, 0)


@dataclass(frozen=True)
class Side:
    """The moves of queries, or of keys, from packed rows to single examples and back.

    `segments` has one int64 [E, longest] per class of examples: 1, or 0 at padding. `rows` is (L, B).
    """

    segments: list[Tensor]
    rows: torch.Size
    to_examples: Move
    to_rows: Move

    @classmethod
    def from_segments(cls, segments: Tensor, number: Tensor, classes: list[Tensor]) -> "Side":
        """Compute the moves from segment ids [B, L].

        `number` [B, L] is the index of a position's example, counted class by class; `classes` has the lengths of the
        examples of each class.
        """
        packed = (segments.t().flatten() > 0).nonzero().squeeze(1)
        example = number.t().flatten()[packed]
        order = example.argsort(stable=True)
        packed, example = packed[order], example[order]
        lengths = torch.cat(classes)
        in_example = torch.arange(len(example)) - (lengths.cumsum(0) - lengths)[example]

        separate, starts, steps, at = [], [], [], 0
        for each in classes:
            longest, count = _longest(each), len(each)
            separate.append((torch.arange(longest) < each.unsqueeze(1)).long())
            starts.append(at + torch.arange(count))
            steps.append(torch.full_like(each, count))
            at += longest * count
        target = torch.cat(starts)[example] + in_example * torch.cat(steps)[example]
        to_examples = Move.from_positions(at, packed, target)
        to_rows = Move.from_positions(segments.numel(), target, packed)
        return cls(separate, segments.t().shape, to_examples, to_rows)

    def unpack(self, x: Tensor) -> list[Tensor]:
        """Split rows [L, B, ...] into examples: [longest, E, ...] of each class."""
        moved = _Moved.apply(x.flatten(0, 1), self.to_examples, self.to_rows)
        parts = moved.split([ids.numel() for ids in self.segments]) if len(self.segments) > 1 else [moved]  # type: ignore
        return [part.unflatten(0, ids.t().shape) for part, ids in zip(parts, self.segments, strict=True)]

    def repack(self, parts: list[Tensor]) -> Tensor:
        """Join examples [longest, E, ...] of each class into rows [L, B, ...], zeros at padding."""
        flat = [part.flatten(0, 1) for part in parts]
        whole = torch.cat(flat) if len(flat) > 1 else flat[0]
        return _Moved.apply(whole, self.to_rows, self.to_examples).unflatten(0, self.rows)  # type: ignore


@dataclass(frozen=True)
class Examples:
    """The examples of packed rows, in one or two classes of about the same length.

    Each list has an entry for the queries and one for the keys, or a single one where both are the same: `segments`,
    int64 [B, L]; `numbers`, int64 [B, L], the index of a position's example, counted class by class (padding: any);
    `lengths`, int64 [E] of each class.
    """

    segments: list[Tensor]
    numbers: list[Tensor]
    lengths: list[list[Tensor]]

    @classmethod
    def from_segments(cls, queries: Tensor, keys: Tensor) -> "Examples | None":
        """Find the examples in segment ids [B, Lq] and [B, Lk] on the host.

        Returns None if separate examples would not save a quarter of the scores.
        """
        in_row = torch.maximum(queries.amax(1), keys.amax(1))
        count = int(in_row.sum())
        if count == 0:
            return None
        first = (in_row.cumsum(0) - in_row).unsqueeze(1)
        segments = [queries] if keys is queries else [queries, keys]
        numbers = [(first + ids - 1).clamp(0, count - 1) for ids in segments]
        lengths = [n[ids > 0].bincount(minlength=count) for n, ids in zip(numbers, segments, strict=True)]
        classes = _classes(lengths[0], lengths[-1])
        new_number = torch.empty(count, dtype=torch.long)
        new_number[torch.cat(classes)] = torch.arange(count)
        by_class = [[length[each] for each in classes] for length in lengths]
        examples = cls(segments, [new_number[number] for number in numbers], by_class)
        return examples if 0 < examples.num_scores <= 0.75 * queries.numel() * keys.shape[1] else None

    @property
    def num_scores(self) -> int:
        """Scores of one head, with every example padded to the longest of its class."""
        pairs = zip(self.lengths[0], self.lengths[-1], strict=True)
        return sum(len(queries) * _longest(queries) * _longest(keys) for queries, keys in pairs)


@dataclass(frozen=True)
class Unpacking:
    """The moves of queries and of keys from packed rows to single examples and back."""

    queries: Side
    keys: Side

    @classmethod
    def from_examples(cls, examples: Examples) -> "Unpacking":
        """Compute the moves; where the queries are the keys, one side serves both."""
        each = zip(examples.segments, examples.numbers, examples.lengths, strict=True)
        sides = [Side.from_segments(segments, number, lengths) for segments, number, lengths in each]
        return cls(sides[0], sides[-1])


def _longest(lengths: Tensor) -> int:
    """Return the longest length, rounded up to WIDTH: whole vector registers are faster."""
    return -(-int(lengths.amax()) // WIDTH) * WIDTH


def _classes(queries: Tensor, keys: Tensor) -> list[Tensor]:
    """Split the examples of these lengths once, between long and short, if that saves enough scores.

    Returns the numbers of the examples of each class; the split saves as many scores as any.
    """
    order = (queries * keys).argsort(descending=True, stable=True)
    q, k = queries[order], keys[order]
    longest = q.cummax(0).values * k.cummax(0).values  # of example i and all before it
    rest = (q.flip(0).cummax(0).values * k.flip(0).cummax(0).values).flip(0)  # of example i and all after it
    ahead = torch.arange(1, len(order))
    split = ahead * longest[:-1] + (len(order) - ahead) * rest[1:]
    if not len(split) or int(split.amin()) > len(order) * int(longest[-1]) - WORTH_A_CLASS:
        return [order]
    return list(order.tensor_split([int(split.argmin()) + 1]))


class _Moved(torch.autograd.Function):
    """A move whose gradient is the move back: each position has at most one target, so there is no scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, move: Move, back: Move) -> Tensor:  # type: ignore[override]
        """x [positions, ...] -> move(x)."""
        ctx.back = back
        return move(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Move the gradient back."""
        return ctx.back(grad), None, None
