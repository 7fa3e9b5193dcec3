"""T5's dropout: one mask for a whole sequence (T5X `broadcast_dims=(-2,)`), the same numbers under any tensor size.

Every tensor-parallel rank draws the masks of all ranks from the same generator and takes its own part. So masks of
split activations are independent, masks of replicated ones are equal, and both are those of one process. It costs
little: a mask has no sequence. Each unit seeds the generator for each micro-batch (`seed_unit`).
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.tensor_parallel import TensorParallel


def seed_unit(seed: int, name: str) -> None:
    """Seed torch's generators for one unit on one micro-batch, so that no cut into stages changes its masks.

    The stages of a pipeline would otherwise start from one state, and their masks would be the same. It seeds the CPU's
    generator and that of the current GPU. `torch.manual_seed` seeds every kind of device: for kinds that this process
    does not use, it keeps the seed with the text of its call stack (torch/cuda/__init__.py `_lazy_call`, torch 2.13),
    which takes milliseconds and memory for every unit of every micro-batch.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    number = int.from_bytes(digest[:7], "big")
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)


def dropout(x: Tensor, dropout_rate: float, module: nn.Module) -> Tensor:
    """Apply dropout to x [L, B, d], whose features every tensor-parallel rank has whole."""
    if not (dropout_rate and module.training):
        return x
    return x * F.dropout(torch.ones_like(x[:1]), dropout_rate)


def split_mask(x: Tensor, dropout_rate: float, module: nn.Module, parallel: TensorParallel) -> Tensor | None:
    """Draw the mask [1, B, f / tensor] of x [L, B, f / tensor], which is split over the tensor-parallel ranks.

    Returns None without dropout.
    """
    if not (dropout_rate and module.training):
        return None
    whole = x.new_ones(1, x.shape[1], x.shape[2] * parallel.size)
    return F.dropout(whole, dropout_rate).chunk(parallel.size, dim=2)[parallel.rank]


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Apply a mask that `split_mask` has drawn."""
    return x if mask is None else x * mask


def value_dropout(value: Tensor, dropout_rate: float, module: nn.Module, parallel: TensorParallel) -> Tensor:
    """Apply the dropout of attention weights to the values [Lk, B, heads / tensor, D].

    One mask serves all queries (T5X `broadcast_dropout`): (weights * mask) value = weights (mask * value).
    """
    if not (dropout_rate and module.training):
        return value
    keys, rows, heads, _ = value.shape
    mask = F.dropout(value.new_ones(rows, heads * parallel.size, keys), dropout_rate)
    return value * mask.chunk(parallel.size, dim=1)[parallel.rank].permute(2, 0, 1).unsqueeze(-1)
