"""Keys and values of one decoder block while it generates, and the attention that reads them."""

import torch
import torch.nn.functional as F
from torch import Tensor

GROWTH = 16  # positions that a cache has room for at first; it doubles when full


class Cache:
    """Keys and values of B rows with N hypotheses each; heads are those of this tensor-parallel rank.

    `cross_key`, `cross_value`: of the encoder, [B, heads, L, d_kv]; hypotheses share them. `length`: positions that
    were generated so far.
    """

    def __init__(self, cross_key: Tensor, cross_value: Tensor) -> None:
        self.cross_key, self.cross_value = cross_key, cross_value
        self.length = 0
        self.held: Tensor | None = None  # key and value, [2, B * N, heads, room, d_kv]

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add new positions [M, B * N, heads, d_kv]; return all keys and values, [B * N, heads, length, d_kv] each."""
        new = torch.stack([key, value]).permute(0, 2, 3, 1, 4)
        before, self.length = self.length, self.length + new.shape[3]
        if self.held is None or self.length > self.held.shape[3]:
            old, room = self.held, max(GROWTH, 2 * before, self.length)
            self.held = new.new_empty(*new.shape[:3], room, new.shape[4])
            if old is not None:
                self.held[:, :, :, :before] = old[:, :, :, :before]
        self.held[:, :, :, before : self.length] = new
        keys, values = self.held[:, :, :, : self.length]
        return keys, values

    def select(self, hypotheses: Tensor) -> None:
        """Continue with these of the B * N hypotheses, int64 [B * N']."""
        if self.held is not None:
            self.held = self.held.index_select(1, hypotheses)

    def clear(self) -> None:
        """Forget the generated positions; the encoder's keys and values stay."""
        self.length, self.held = 0, None


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Compute T5's attention, which is not scaled: query [B, H, Lq, D], key and value [B, H, Lk, D] -> as query.

    `mask`: what is added to the scores, or bool where a score counts; broadcast to [B, H, Lq, Lk].
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
