"""Initial values of logical tensors, as flax draws them for T5X and big_vision.

An initializer fills consecutive rows of a tensor of the given shape, from first to last, so that `draw_block` can draw
a large tensor some rows at a time.
"""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

Initializer = Callable[[Tensor, Generator, torch.Size], object]
AT_ONCE = 2**24  # elements that are drawn at once
VECTOR = 16  # torch's CPU makes so many normal values from as many numbers, and draws fewer in another way


def zeros(x: Tensor, _: Generator, shape: torch.Size) -> Tensor:
    """Fill with zeros."""
    return x.zero_()


def ones(x: Tensor, _: Generator, shape: torch.Size) -> Tensor:
    """Fill with ones."""
    return x.fill_(1.0)


def constant(value: float) -> Initializer:
    """Return an initializer that fills with one value."""
    return lambda x, _, shape: x.fill_(value)


def normal(std: float) -> Initializer:
    """Return an initializer that draws from a normal distribution of mean 0."""
    return lambda x, generator, shape: x.normal_(0.0, std, generator=generator)


def xavier_uniform(x: Tensor, generator: Generator, shape: torch.Size) -> Tensor:
    """Draw as flax `xavier_uniform`, which big_vision's ViT uses for every kernel."""
    bound = math.sqrt(3.0) * math.sqrt(2.0 / (shape[0] + shape[1]))
    return x.uniform_(-bound, bound, generator=generator)


def fan_in_normal(x: Tensor, generator: Generator, shape: torch.Size) -> Tensor:
    """Draw a [d_out, d_in] matrix as flax `variance_scaling(1.0, "fan_in", "normal")` (T5X attention kernels)."""
    return x.normal_(0.0, shape[1] ** -0.5, generator=generator)


def fan_in_truncated(x: Tensor, generator: Generator, shape: torch.Size) -> Tensor:
    """Draw as flax `variance_scaling(1.0, "fan_in", "truncated_normal")` (T5X MLP, logits).

    Cut at 2 sigma, then scaled to the variance 1 / d_in. torch draws values beyond the cut again, so that it takes more
    or fewer numbers of the generator; above `AT_ONCE` elements the inverse of the distribution takes one for each.
    """
    std = shape[1] ** -0.5 / 0.87962566103423978
    if shape.numel() <= AT_ONCE:
        return nn.init.trunc_normal_(x, 0.0, std, -2 * std, 2 * std, generator=generator)
    bound = math.erf(math.sqrt(2.0))
    return x.uniform_(-bound, bound, generator=generator).erfinv_().mul_(std * math.sqrt(2.0)).clamp_(-2 * std, 2 * std)


def draw_block(initialize: Initializer, shape: torch.Size, block: tuple[slice, ...], generator: Generator) -> Tensor:
    """Return a block of a tensor with the values that it has where the whole is drawn; fp32 on the CPU.

    At most the block and `AT_ONCE` elements exist at once. Each value takes one 32-bit number of the generator: those
    of rows before the block are drawn and dropped, which takes a fraction of the time, those after it not drawn.
    """
    columns, first, stop = shape[1:].numel(), block[0].start, block[0].stop
    found = torch.empty([part.stop - part.start for part in block], device="cpu")
    run = max(1, AT_ONCE // (VECTOR * columns)) * VECTOR  # rows; several times VECTOR elements
    start = 0
    while start < stop:
        end = start + run if start + run + VECTOR <= shape[0] else shape[0]  # the last run is no short one
        if end <= first:
            torch.empty((end - start) * columns, dtype=torch.int32).random_(generator=generator)
        else:
            rows = torch.empty(end - start, *shape[1:], device="cpu")
            initialize(rows, generator, shape)
            low, high = max(start, first), min(end, stop)
            found[low - first : high - first] = rows[(slice(low - start, high - start), *block[1:])]
        start = end
    return found
