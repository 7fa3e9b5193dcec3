"""Masks of packed rows, in the form that each kernel of attention reads."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from model.attention.blocks import Blocks
from model.attention.examples import Examples, Unpacking


@dataclass
class Mask:
    """The keys that each query attends to: those with its segment id, and none after it if `causal`.

    `queries` [B, Lq] and `keys` [B, Lk] are segment ids. Each form of the mask is computed once, for all layers. One
    row of two examples and padding (0), which attends to padding so that every softmax has a finite score:

        encoder to itself            decoder to itself, causal    decoder (down) to encoder
            1 1 1 2 2 0                  1 1 2 2 0                    1 1 1 2 2 0
        1   # # # . . .              1   # . . . .                1   # # # . . .
        1   # # # . . .              1   # # . . .                1   # # # . . .
        1   # # # . . .              2   . . # . .                2   . . . # # .
        2   . . . # # .              2   . . # # .                2   . . . # # .
        2   . . . # # .              0   . . . . #                0   . . . . . #
        0   . . . . . #
    """

    queries: Tensor
    keys: Tensor
    causal: bool = False

    @cached_property
    def allowed(self) -> Tensor:
        """The mask as bool [B, 1, Lq, Lk]."""
        same = self.queries[:, :, None] == self.keys[:, None, :]
        return (same.tril() if self.causal else same).unsqueeze(1)

    @cached_property
    def host_blocks(self) -> Blocks:
        """The blocks of scores that are computed, found on the host."""
        return Blocks.from_segments(self.queries, self.keys, self.causal)

    @cached_property
    def blocks(self) -> BlockMask:
        """The mask in block-sparse form: blocks between two packed examples are never computed."""
        # A function that captured `self` would make a cycle: only the garbage collector could free its tensors.
        queries, keys, causal = self.queries, self.keys, self.causal

        def may(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = queries[batch, query] == keys[batch, key]
            return same & (query >= key) if causal else same

        return self.host_blocks.mask(may)

    def to_device(self, queries: Tensor, keys: Tensor) -> "Mask":
        """Return the mask of the same segment ids on a device; its blocks are found on the host."""
        moved = Mask(queries, keys, self.causal)
        moved.host_blocks = self.host_blocks.to(queries.device)
        return moved

    @cached_property
    def examples(self) -> Examples | None:
        """The examples to attend separately, or None where that does not save enough scores.

        CPU only: a GPU uses `blocks`, and reading lengths would synchronize with it.
        """
        return None if self.queries.is_cuda else Examples.from_segments(self.queries, self.keys)

    @cached_property
    def unpacking(self) -> Unpacking | None:
        """The moves of positions from rows to single examples and back; None as `examples`."""
        return Unpacking.from_examples(self.examples) if self.examples else None

    @cached_property
    def unpacked(self) -> "list[Mask]":
        """The masks of the separate examples, one per length class."""
        assert self.unpacking is not None
        sides = zip(self.unpacking.queries.segments, self.unpacking.keys.segments, strict=True)
        return [Mask(queries, keys, self.causal) for queries, keys in sides]

    @property
    def num_scores(self) -> int:
        """Attention scores that one head computes on a CPU."""
        return self.examples.num_scores if self.examples else self.queries.numel() * self.keys.shape[1]
