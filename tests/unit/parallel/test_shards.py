"""Flat slices of stacked tensor-parallel blocks are rectangles of logical tensors, each element exactly once."""

import torch

from model.initializers import zeros
from model.layers import Part
from parallel.shards import rectangles


def test_every_slice_of_a_stack_of_blocks_finds_its_place() -> None:
    """A parameter that stacks rank 1's row block of `a` [6, 5] (of 2 ranks) and its row block of `b` [4, 5]."""
    a, b = torch.arange(30.0).view(6, 5), 100 + torch.arange(20.0).view(4, 5)
    parts = [
        Part("a", a.shape, zeros, (3, 0), torch.Size((3, 5)), 0),
        Part("b", b.shape, zeros, (2, 0), torch.Size((2, 5)), 15),
    ]
    flat = torch.cat([a[3:].flatten(), b[2:].flatten()])
    for first in range(len(flat)):
        for count in range(1, len(flat) - first + 1):
            shard = flat[first : first + count]
            found = rectangles(parts, first, count, 0, counted=True)
            assert sum(r.size.numel() for r in found) == count
            for r in found:
                where = tuple(slice(o, o + n) for o, n in zip(r.offset, r.size, strict=True))
                assert torch.equal(r.view(shard), {"a": a, "b": b}[r.name][where])


def test_at_most_three_rectangles_a_block() -> None:
    part = Part("a", torch.Size((10, 7)), zeros, (0, 0), torch.Size((10, 7)), 0)
    assert max(len(rectangles([part], f, c, 0, True)) for f in range(69) for c in range(1, 70 - f)) == 3


def test_column_blocks_keep_their_columns() -> None:
    """Row-parallel weights are column blocks: rank 1 of 2 holds columns 4..7 of [3, 8]."""
    whole = torch.arange(24.0).view(3, 8)
    part = Part("w", whole.shape, zeros, (0, 4), torch.Size((3, 4)), 0)
    flat = whole[:, 4:].flatten()
    (r,) = rectangles([part], 4, 8, 0, counted=True)
    assert (r.offset, r.size) == ((1, 4), (2, 4))
    assert torch.equal(r.view(flat[4:12]), whole[1:3, 4:])


def test_vectors() -> None:
    part = Part("v", torch.Size((10,)), zeros, (5,), torch.Size((5,)), 0)
    (r,) = rectangles([part], 1, 3, 20, counted=False)
    assert (r.offset, tuple(r.size), r.start, r.counted) == ((6,), (3,), 20, False)
