"""T5's relative position bias, by distance and head: made once for a stack and a micro-batch.

The bias of query i and key j depends on j - i alone. So [heads, distances] holds all of it, and all distances of
`max_distance` or more share a bucket: whatever a longer row needs, the ends of the table have.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from model.config import MT5Config

WIDTH = 8  # lengths of examples are padded to multiples of it (model.attention.examples)


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
    segment, because segments are contiguous. Computed on the host: a device's logarithm may be one bit less at a power
    of two, which is another bucket.
    """
    distance = torch.arange(1 - num_queries, num_keys, device="cpu") - first_query
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
    buckets += torch.where(distance < exact, distance, logarithmic.clamp(max=num_buckets - 1))
    return buckets.to(device, non_blocking=True)


def reach(length: int, config: MT5Config) -> int:
    """Return R such that a bias for rows of `length` positions has the distances -R < j - i < R.

    At least `max_distance` + 1, so that the ends of the bias hold for all distances beyond.
    """
    return max(-(-length // WIDTH) * WIDTH, config.relative_attention_max_distance + 1)


def bias_by_distance(table: Tensor, config: MT5Config, length: int, bidirectional: bool) -> Tensor:
    """Look up a table [buckets, heads] for rows of `length` positions: fp32 [heads, 2 R - 1], distance 0 at R - 1.

    R is `reach`. fp32, so that the gradients of all blocks are added in fp32.
    """
    far = reach(length, config)
    buckets = relative_buckets(
        far,
        far,
        bidirectional,
        config.relative_attention_num_buckets,
        config.relative_attention_max_distance,
        table.device,
    )
    return table.float()[buckets].t().contiguous()


def relative_bias(
    by_distance: Tensor, num_queries: int, num_keys: int, dtype: torch.dtype, first_query: int = 0
) -> Tensor:
    """Spread a bias by distance [heads, 2 R - 1] over queries and keys: [heads, num_queries, num_keys].

    Its gradient is summed along the diagonals, in fp32.
    """
    zero = by_distance.shape[1] // 2
    first, count = zero - (num_queries - 1) - first_query, num_queries + num_keys - 1
    if first >= 0 and first + count <= by_distance.shape[1]:
        diagonals = by_distance[:, first : first + count]
    else:  # a longer row than the bias was made for, as in generation
        last = by_distance.shape[1] - 1
        index = torch.arange(first, first + count, device=by_distance.device)
        diagonals = by_distance[:, index.clamp(0, last)]
    return diagonals.unfold(1, num_keys, 1).flip(1).to(dtype)
