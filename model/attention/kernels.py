"""Attention of the ViT (scaled, no mask), and T5's (unscaled, relative bias, packed rows) by several kernels.

All T5 kernels compute softmax(q k^T + bias) v over the scores that the mask allows, and are one line of `KERNELS`:

    plain   the definition, on any device; on a CPU example by example, because scores between examples are wasted
    sdpa    torch's scaled_dot_product_attention with bias and mask as one dense tensor: cuDNN's kernel on Hopper
    flex    torch's flex_attention: bias and mask are looked up, blocks between examples are skipped
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from common.errors import ConfigurationError
from model.attention.bias import relative_bias
from model.attention.masks import Mask

# query [Lq, B, H, D], key and value [Lk, B, H, D], bias by distance [H, 2 R - 1] or None, mask, whether the backward
# pass computes the scores again instead of keeping them -> [Lq, B, H * D]
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, Mask, bool], Tensor]

FASTEST = {"cpu": "plain", "cuda": "flex"}  # the kernel of model.attention=auto, by type of device
MOST_SHAPES = 128  # kernels of flex that a process compiles: one for each pair of lengths, with and without gradients
HOPPER = (9, 0)  # compute capability


def kernel_name(attention: str, on_gpu: bool) -> str:
    """Return the kernel of T5's attention that a value of `model.attention` chooses on a kind of device."""
    return FASTEST["cuda" if on_gpu else "cpu"] if attention == "auto" else attention


def plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Mask, recompute: bool) -> Tensor:
    """Attend by the definition; see `Kernel`."""
    if moves := mask.unpacking:
        queries, keys, values = moves.queries.unpack(query), moves.keys.unpack(key), moves.keys.unpack(value)
        classes = zip(queries, keys, values, mask.unpacked, strict=True)
        return moves.queries.repack([_run(dense, recompute, q, k, v, bias, own.allowed) for q, k, v, own in classes])
    return _run(dense, recompute, query, key, value, bias, mask.allowed)


def sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Mask, recompute: bool) -> Tensor:
    """Attend by torch's scaled_dot_product_attention; see `Kernel`."""
    return _run(_scaled_dot_product, recompute, query, key, value, bias, mask.allowed)


def flex(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Mask, recompute: bool) -> Tensor:
    """Attend by torch's flex_attention, which keeps no scores anyway; see `Kernel`.

    Raises ConfigurationError where rows have so many lengths that it would be compiled over and over.
    """
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    score = None
    if bias is not None:
        zero = bias.shape[1] // 2

        def score(value, batch, head, i, j):  # type: ignore[no-untyped-def]
            return value + bias[head, j - i + zero]

    attend = compiled_flex() if q.is_cuda else flex_attention
    try:
        attended = attend(q, k, v, score_mod=score, block_mask=mask.blocks, scale=1.0)
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise ConfigurationError(
            f"model.attention=flex has compiled kernels for {MOST_SHAPES} pairs of lengths; set data.trim_multiple=0, "
            "so that all rows have one length, or model.attention=sdpa."
        ) from error
    return attended.permute(2, 0, 1, 3).flatten(2)


KERNELS: dict[str, Kernel] = {"plain": plain, "sdpa": sdpa, "flex": flex}


def _run(attention: Callable[..., Tensor], recompute: bool, *inputs: object) -> Tensor:
    if recompute and torch.is_grad_enabled():
        return checkpoint(attention, *inputs, use_reentrant=False)
    return attention(*inputs)


def dense(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, allowed: Tensor) -> Tensor:
    """Compute all scores of every row; a masked one is the least finite number. `allowed`: bool [B, 1, Lq, Lk].

    Softmax sums in fp32 whatever the type.
    """
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    scores = q @ k.transpose(2, 3)
    if bias is not None:
        scores += relative_bias(bias, q.shape[2], k.shape[2], q.dtype)
    with torch.no_grad():  # a masked score has weight 0, so its gradient is 0 and the mask need not be kept
        scores.masked_fill_(~allowed, torch.finfo(scores.dtype).min)
    return (F.softmax(scores, dim=-1) @ v).permute(2, 0, 1, 3).flatten(2)


def _scaled_dot_product(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, allowed: Tensor) -> Tensor:
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    mask = allowed
    if bias is not None:
        spread = relative_bias(bias, q.shape[2], k.shape[2], q.dtype)
        mask = torch.where(allowed, spread, torch.finfo(q.dtype).min)
    with _cudnn_first_on_hopper():
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    return attended.permute(2, 0, 1, 3).flatten(2)


def vit_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend fully within each image, scaled by 1/sqrt(D).

    query [Nq, I, H, D], key and value [Nk, I, H, D] -> [Nq, I, H * D].
    """
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    with _cudnn_first_on_hopper():
        return F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).flatten(2)


@contextmanager
def _cudnn_first_on_hopper() -> Iterator[None]:
    """Let scaled_dot_product_attention try cuDNN's kernel before flash attention's, on Hopper only.

    There it is 1.7 to 2.3 times faster in training; on other devices it is not (huggingface/transformers#48163).
    """
    if not _is_hopper():
        yield
        return
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield


@lru_cache(maxsize=1)
def _is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == HOPPER


@lru_cache(maxsize=1)
def compiled_flex():  # type: ignore[no-untyped-def]
    """Return flex_attention as compiled kernels, one for each shape.

    `fullgraph`: at the limit it raises, where torch would otherwise compute all scores without a word.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MOST_SHAPES)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * MOST_SHAPES)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """Reshape [L, B, H * D] -> [L, B, H, D]."""
    return x.unflatten(-1, (-1, head_dim))
