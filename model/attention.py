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
    """Who may attend to whom: equal segment ids, and the past alone if `causal`; padding (0) attends to padding.

    `queries` [B, Lq] and `keys` [B, Lk] are segment ids. Both forms are made once, for all layers.
    """

    queries: Tensor
    keys: Tensor
    causal: bool = False

    @cached_property
    def allowed(self) -> Tensor:
        """bool [B, 1, Lq, Lk]."""
        same = self.queries[:, :, None] == self.keys[:, None, :]
        return (same.tril() if self.causal else same).unsqueeze(1)

    @cached_property
    def blocks(self) -> BlockMask:
        """The block-sparse form: blocks between two packed examples are never computed."""

        def may(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = self.queries[batch, query] == self.keys[batch, key]
            return same & (query >= key) if self.causal else same

        (rows, num_queries), num_keys = self.queries.shape, self.keys.shape[1]
        return create_block_mask(may, rows, None, num_queries, num_keys, device=self.queries.device)

    @cached_property
    def examples(self) -> Examples | None:
        """What to take packed rows apart into where that is worth it: on a CPU. A GPU has `blocks`, and would have to
        wait for the lengths."""
        return None if self.queries.is_cuda else Examples.of(self.queries, self.keys)

    @cached_property
    def unpacking(self) -> Unpacking | None:
        """How to take them apart; None where it is not worth it."""
        return Unpacking.of(self.examples) if self.examples else None

    @cached_property
    def unpacked(self) -> "list[Mask]":
        """Those of the examples taken apart, class by class."""
        assert self.unpacking is not None
        sides = zip(self.unpacking.queries.segments, self.unpacking.keys.segments, strict=True)
        return [Mask(queries, keys, self.causal) for queries, keys in sides]

    @property
    def num_scores(self) -> int:
        """Scores of one head that are computed on a CPU."""
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
    """Bucket of every distance from a query to a key, int64 [num_queries + num_keys - 1]: that of query i and key j
    is number j - i + num_queries - 1.

    T5X `_relative_position_bucket`: half of the buckets are exact distances, half grow logarithmically up to
    `max_distance`. Distances count within a packed segment, because segments are contiguous.
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
    """T5 relative position bias, [heads, num_queries, num_keys], from a table [buckets, heads].

    The same along every diagonal: looked up once per distance. Its gradient is summed along the diagonals, in fp32.
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
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, allowed: Tensor, dropout: float
) -> Tensor:
    """softmax(q k^T + bias) v without 1/sqrt(d) scaling; masked scores are the least finite number.

    query [Lq, B, H, D]; key, value [Lk, B, H, D]; bias [H, Lq, Lk] or None; allowed bool [B, 1, Lq, Lk].
    Returns [Lq, B, H * D]. Softmax sums in fp32 whatever the type.
    """
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    scores = q @ k.transpose(2, 3)
    if bias is not None:
        scores += bias
    with torch.no_grad():  # a masked score has no weight, so softmax gives it no gradient: nothing to keep for later
        scores.masked_fill_(~allowed, torch.finfo(scores.dtype).min)
    weights = F.softmax(scores, dim=-1)
    if dropout:  # one mask for all queries (T5X `broadcast_dropout`)
        weights = weights * F.dropout(torch.ones_like(weights[:, :, :1]), dropout)
    return (weights @ v).permute(2, 0, 1, 3).flatten(2)


def vit_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Full attention within each image, scaled by 1/sqrt(D): query [Nq, I, H, D], key and value [Nk, I, H, D] ->
    [Nq, I, H * D]."""
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
    """`t5_attention` as one fused kernel: the bias is looked up inside it, so that [H, Lq, Lk] never exists."""
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
    # Each kind of attention and each shape is compiled anew; beyond the limit (8) torch falls back to all scores.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex_attention, dynamic=False)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[L, B, H * D] -> [L, B, H, D]."""
    return x.unflatten(-1, (-1, head_dim))


def dropout(x: Tensor, rate: float, module: nn.Module) -> Tensor:
    """T5 dropout: one mask over the whole sequence (T5X `broadcast_dims=(-2,)`); x is [L, B, d]."""
    if not (rate and module.training):
        return x
    return x * F.dropout(torch.ones_like(x[:1]), rate)
