"""Initial values of logical tensors, as flax draws them for T5X and big_vision."""

from collections.abc import Callable

from torch import Generator, Tensor, nn

Initializer = Callable[[Tensor, Generator], object]
AT_ONCE = 2**24  # elements; torch's truncated normal takes several times the memory of its result


def zeros(x: Tensor, _: Generator) -> Tensor:
    """Fill with zeros."""
    return x.zero_()


def ones(x: Tensor, _: Generator) -> Tensor:
    """Fill with ones."""
    return x.fill_(1.0)


def constant(value: float) -> Initializer:
    """Return an initializer that fills with one value."""
    return lambda x, _: x.fill_(value)


def normal(std: float) -> Initializer:
    """Return an initializer that draws from a normal distribution of mean 0."""
    return lambda x, generator: x.normal_(0.0, std, generator=generator)


def xavier_uniform(x: Tensor, generator: Generator) -> Tensor:
    """Draw as flax `xavier_uniform`, which big_vision's ViT uses for every kernel."""
    return nn.init.xavier_uniform_(x, generator=generator)


def fan_in_normal(x: Tensor, generator: Generator) -> Tensor:
    """Draw a [d_out, d_in] matrix as flax `variance_scaling(1.0, "fan_in", "normal")` (T5X attention kernels)."""
    return x.normal_(0.0, x.shape[1] ** -0.5, generator=generator)


def fan_in_truncated(x: Tensor, generator: Generator) -> Tensor:
    """Draw as flax `variance_scaling(1.0, "fan_in", "truncated_normal")` (T5X MLP, logits).

    Cut at 2 sigma, then scaled to the variance 1 / d_in.
    """
    std = x.shape[1] ** -0.5 / 0.87962566103423978
    for rows in x.split(max(1, AT_ONCE // x.shape[1])):
        nn.init.trunc_normal_(rows, 0.0, std, -2 * std, 2 * std, generator=generator)
    return x
