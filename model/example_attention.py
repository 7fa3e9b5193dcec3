"""Packed rows taken apart for attention: every example in a row of its own, no score between two of them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WORTH_A_CLASS = 2**16  # scores; fewer cost less than the operators of one more class
WIDTH = 8  # lengths are multiples of it: softmax, and products in bf16, are faster on whole vector registers


@dataclass(frozen=True)
class Move:
    """Positions moved, all in one go: position i of the result comes from `source[i]` (int64) of a flattened [L, B].

    Those at `empty` come from nowhere, and are zero.
    """

    source: Tensor
    empty: Tensor

    @classmethod
    def of(cls, length: int, source: Tensor, target: Tensor) -> "Move":
        """From the positions `source` to the positions `target` of a result of that length."""
        sources = source.new_full((length,), -1)
        sources[target] = source
        return cls(sources.clamp(min=0), (sources < 0).nonzero().squeeze(1))

    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, self.source).index_fill_(0, self.empty, 0)


@dataclass(frozen=True)
class Side:
    """The queries or the keys of packed rows [L, B], there and back.

    `segments` of each class of examples: int64 [E, longest], 1, or 0 where padded.
    """

    segments: list[Tensor]
    rows: torch.Size
    apart: Move
    together: Move

    @classmethod
    def of(cls, segments: Tensor, number: Tensor, classes: list[Tensor]) -> "Side":
        """From segment ids [B, L]; `number` [B, L] is the place of a position's example in the order of the classes,
        whose examples have the lengths `classes`."""
        packed = (segments.t().flatten() > 0).nonzero().squeeze(1)
        example = number.t().flatten()[packed]
        order = example.argsort(stable=True)
        packed, example = packed[order], example[order]
        lengths = torch.cat(classes)
        place = torch.arange(len(example)) - (lengths.cumsum(0) - lengths)[example]

        alone, starts, steps, at = [], [], [], 0
        for each in classes:
            longest, count = _longest(each), len(each)
            alone.append((torch.arange(longest) < each.unsqueeze(1)).long())
            starts.append(at + torch.arange(count))
            steps.append(torch.full_like(each, count))
            at += longest * count
        target = torch.cat(starts)[example] + place * torch.cat(steps)[example]
        there, back = Move.of(at, packed, target), Move.of(segments.numel(), target, packed)
        return cls(alone, segments.t().shape, there, back)

    def unpack(self, x: Tensor) -> list[Tensor]:
        """[L, B, ...] -> [longest, E, ...] of each class."""
        moved = _Moved.apply(x, self.apart, self.together)
        parts = moved.split([ids.numel() for ids in self.segments]) if len(self.segments) > 1 else [moved]  # type: ignore
        return [part.unflatten(0, ids.t().shape) for part, ids in zip(parts, self.segments, strict=True)]

    def repack(self, parts: list[Tensor]) -> Tensor:
        """[longest, E, ...] of each class -> [L, B, ...], zeros where a row has no example."""
        flat = [part.flatten(0, 1) for part in parts]
        whole = torch.cat(flat) if len(flat) > 1 else flat[0]
        return _Moved.apply(whole.unsqueeze(1), self.together, self.apart).unflatten(0, self.rows)  # type: ignore


@dataclass(frozen=True)
class Examples:
    """Which examples lie in packed rows, in one or two classes of about the same length.

    Of the queries and of the keys, or once where both are the same: `segments`, int64 [B, L]; `numbers`, int64 [B, L],
    the place of a position's example in the order of the classes (padding: any); `lengths`, int64 [E] of each class.
    """

    segments: list[Tensor]
    numbers: list[Tensor]
    lengths: list[list[Tensor]]

    @classmethod
    def of(cls, queries: Tensor, keys: Tensor) -> "Examples | None":
        """Of segment ids [B, Lq] and [B, Lk] on the host; None if taking them apart does not make the scores a quarter
        fewer."""
        in_row = torch.maximum(queries.amax(1), keys.amax(1))
        count = int(in_row.sum())
        if count == 0:
            return None
        first = (in_row.cumsum(0) - in_row).unsqueeze(1)
        segments = [queries] if keys is queries else [queries, keys]
        numbers = [(first + ids - 1).clamp(0, count - 1) for ids in segments]
        lengths = [n[ids > 0].bincount(minlength=count) for n, ids in zip(numbers, segments, strict=True)]
        classes = _classes(lengths[0], lengths[-1])
        place = torch.empty(count, dtype=torch.long)
        place[torch.cat(classes)] = torch.arange(count)
        by_class = [[length[each] for each in classes] for length in lengths]
        examples = cls(segments, [place[number] for number in numbers], by_class)
        return examples if 0 < examples.num_scores <= 0.75 * queries.numel() * keys.shape[1] else None

    @property
    def num_scores(self) -> int:
        """Of one head, where every example is as long as the longest of its class."""
        pairs = zip(self.lengths[0], self.lengths[-1], strict=True)
        return sum(len(queries) * _longest(queries) * _longest(keys) for queries, keys in pairs)


@dataclass(frozen=True)
class Unpacking:
    """The examples of packed rows, one per row, class by class."""

    queries: Side
    keys: Side

    @classmethod
    def of(cls, examples: Examples) -> "Unpacking":
        """Where the queries are the keys, one side serves both."""
        each = zip(examples.segments, examples.numbers, examples.lengths, strict=True)
        sides = [Side.of(segments, number, lengths) for segments, number, lengths in each]
        return cls(sides[0], sides[-1])


def _longest(lengths: Tensor) -> int:
    """The longest, rounded up."""
    return -(-int(lengths.amax()) // WIDTH) * WIDTH


def _classes(queries: Tensor, keys: Tensor) -> list[Tensor]:
    """Numbers of the examples of these lengths, cut once, between long and short, where that saves most scores."""
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
    """A position goes to one place at most, so its gradient just goes back: nothing is summed up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Move, back: Move) -> Tensor:  # type: ignore[override]
        ctx.back, ctx.shape = back, x.shape
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.back(grad.unsqueeze(1)).view(ctx.shape), None, None
