"""Attention of both towers: the ViT's (scaled, no mask) and T5's (unscaled, relative bias, packed rows)."""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from model.config import MT5Config
from model.example_attention import Examples, Unpacking


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
    def blocks(self) -> BlockMask:
        """The mask in block-sparse form: blocks between two packed examples are never computed."""

        def may(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = self.queries[batch, query] == self.keys[batch, key]
            return same & (query >= key) if self.causal else same

        (rows, num_queries), num_keys = self.queries.shape, self.keys.shape[1]
        return create_block_mask(may, rows, None, num_queries, num_keys, device=self.queries.device)

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


@lru_cache(maxsize=32)
def relative_buckets(
    num_queries: int,
    num_keys: int,
    bidirectional: bool,
    num_buckets: int,
    max_distance: int,
    device: torch.device,
    first_query: int = 0,
) -> Tensor:
    """Return the bucket of every distance from a query to a key, int64 [num_queries + num_keys - 1].

    The bucket of query i and key j is number j - i + num_queries - 1. T5X `_relative_position_bucket`: half of the
    buckets are exact distances, half grow logarithmically up to `max_distance`. Distances count within a packed
    segment, because segments are contiguous.
    """
    distance = torch.arange(1 - num_queries, num_keys, device=device) - first_query
    buckets = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        buckets += (distance > 0).long() * num_buckets
        distance = distance.abs()
    else:
        distance = -distance.clamp(max=0)
    exact = num_buckets // 2
    scale = (num_buckets - exact) / math.log(max_distance / exact)
    logarithmic = exact + (torch.log(distance.clamp(min=1).float() / exact) * scale).long()
    return buckets + torch.where(distance < exact, distance, logarithmic.clamp(max=num_buckets - 1))


def relative_bias(
    table: Tensor, config: MT5Config, num_queries: int, num_keys: int, bidirectional: bool, first_query: int = 0
) -> Tensor:
    """Compute T5's relative position bias, [heads, num_queries, num_keys], from a table [buckets, heads].

    The bias is constant along diagonals, so each distance is looked up once. Its gradient is summed along the
    diagonals, in fp32.
    """
    buckets = relative_buckets(
        num_queries,
        num_keys,
        bidirectional,
        config.relative_attention_num_buckets,
        config.relative_attention_max_distance,
        table.device,
        first_query,
    )
    return table.float()[buckets].t().unfold(1, num_keys, 1).flip(1).to(table.dtype)


def t5_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, allowed: Tensor, dropout_rate: float
) -> Tensor:
    """Compute softmax(q k^T + bias) v, without 1/sqrt(d) scaling; masked scores are the least finite number.

    query [Lq, B, H, D]; key, value [Lk, B, H, D]; bias [H, Lq, Lk] or None; allowed bool [B, 1, Lq, Lk].
    Returns [Lq, B, H * D]. Softmax sums in fp32 whatever the type.
    """
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    scores = q @ k.transpose(2, 3)
    if bias is not None:
        scores += bias
    with torch.no_grad():  # a masked score has weight 0, so its gradient is 0 and the mask need not be kept
        scores.masked_fill_(~allowed, torch.finfo(scores.dtype).min)
    weights = F.softmax(scores, dim=-1)
    if dropout_rate:  # one mask for all queries (T5X `broadcast_dropout`)
        weights = weights * F.dropout(torch.ones_like(weights[:, :, :1]), dropout_rate)
    return (weights @ v).permute(2, 0, 1, 3).flatten(2)


def vit_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend fully within each image, scaled by 1/sqrt(D).

    query [Nq, I, H, D], key and value [Nk, I, H, D] -> [Nq, I, H * D].
    """
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).flatten(2)


def flex_t5_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor | None,
    config: MT5Config,
    bidirectional: bool,
    blocks: BlockMask,
) -> Tensor:
    """Compute `t5_attention` as one fused kernel, which looks the bias up, so that [H, Lq, Lk] never exists."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    score = None
    if table is not None:
        last = q.shape[2] - 1
        buckets = relative_buckets(
            q.shape[2],
            k.shape[2],
            bidirectional,
            config.relative_attention_num_buckets,
            config.relative_attention_max_distance,
            q.device,
        )

        def score(value, batch, head, i, j):  # type: ignore[no-untyped-def]
            return value + table[buckets[j - i + last], head]

    attend = _compiled_flex() if q.is_cuda else flex_attention
    return attend(q, k, v, score_mod=score, block_mask=blocks, scale=1.0).permute(2, 0, 1, 3).flatten(2)


@lru_cache(maxsize=1)
def _compiled_flex():  # type: ignore[no-untyped-def]
    # Each kind of attention and each shape compiles anew; beyond the limit (8) torch would compute all scores.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex_attention, dynamic=False)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """Reshape [L, B, H * D] -> [L, B, H, D]."""
    return x.unflatten(-1, (-1, head_dim))


def dropout(x: Tensor, dropout_rate: float, module: nn.Module) -> Tensor:
    """Apply T5 dropout to x [L, B, d]: one mask over the whole sequence (T5X `broadcast_dims=(-2,)`)."""
    if not (dropout_rate and module.training):
        return x
    return x * F.dropout(torch.ones_like(x[:1]), dropout_rate)
