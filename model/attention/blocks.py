"""The blocks of scores that flex_attention computes, found on the host from the ends of the packed examples.

A block is 128 queries by 128 keys. Scores of a *full* block all count, those of a *partial* one are masked, and all
other blocks are never computed. torch's `create_block_mask` finds them on the device, from all scores.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # flex_attention's default
PARTS = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)


@dataclass(frozen=True)
class Blocks:
    """The lists of a `BlockMask`, as one int32 tensor for a single copy to the device; `shapes` are those of `PARTS`.

    `lengths`: queries and keys.
    """

    packed: Tensor
    shapes: tuple[tuple[int, ...], ...]
    lengths: tuple[int, int]

    @classmethod
    def from_segments(cls, queries: Tensor, keys: Tensor, causal: bool) -> "Blocks":
        """Find the blocks of segment ids [B, Lq] and [B, Lk] on the host; see `model.attention.masks.Mask`."""
        padding = int(torch.maximum(queries.amax(), keys.amax())) + 1
        (q_least, q_largest, q_whole), (k_least, k_largest, k_whole) = (_ends(x, padding) for x in (queries, keys))
        # Ids ascend in a row -> a block of queries and one of keys share an id only if their ranges of ids overlap.
        some = (q_least[:, :, None] <= k_largest[:, None, :]) & (k_least[:, None, :] <= q_largest[:, :, None])
        every = (q_least == q_largest)[:, :, None] & (k_least == k_largest)[:, None, :]
        every &= (q_least[:, :, None] == k_least[:, None, :]) & q_whole[:, None] & k_whole[None, :]
        if causal:
            query, key = (np.arange(x.shape[1]) for x in (q_least, k_least))
            some &= key[None, :] <= query[:, None]
            every &= key[None, :] < query[:, None]
        kinds = [(some & ~every)[:, None], every[:, None]]
        lists = [part for each in kinds for part in _ordered(each)]
        lists += [part for each in kinds for part in _ordered(each.swapaxes(2, 3))]
        packed = torch.from_numpy(np.concatenate([part.ravel() for part in lists]))
        return cls(packed, tuple(part.shape for part in lists), (queries.shape[1], keys.shape[1]))

    def to(self, device: torch.device) -> "Blocks":
        """Return a copy on the device, without waiting for it."""
        return Blocks(self.packed.to(device, non_blocking=True), self.shapes, self.lengths)

    def pinned(self) -> "Blocks":
        """Return a copy in page-locked memory."""
        return Blocks(self.packed.pin_memory(), self.shapes, self.lengths)

    def mask(self, may: Callable[..., Tensor]) -> BlockMask:
        """Return torch's form; `may(batch, head, query, key)` masks the scores of partial blocks."""
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        lists = [part.view(shape) for part, shape in zip(self.packed.split(sizes), self.shapes, strict=True)]
        named = dict(zip(PARTS, lists, strict=True))
        return BlockMask(seq_lengths=self.lengths, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=may, **named)


def _ends(segments: Tensor, padding: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the least and the largest id of every block, int64 [B, blocks] each, and whether it is whole [blocks].

    Padding attends to padding -> it is an example of its own, with the largest id, `padding`.
    """
    ids = segments.numpy()
    ids = np.where(ids > 0, ids, padding)
    rows, length = ids.shape
    ids = np.pad(ids, ((0, 0), (0, -length % BLOCK)), mode="edge").reshape(rows, -1, BLOCK)
    return ids.min(2), ids.max(2), (np.arange(ids.shape[1]) + 1) * BLOCK <= length


def _ordered(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each row of blocks, of chosen [B, 1, rows, columns]: their number, and all columns, chosen first."""
    count = chosen.sum(3, dtype=np.int32)
    return count, np.argsort(~chosen, axis=3, kind="stable").astype(np.int32)
