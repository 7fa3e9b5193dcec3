"""Norms, whose parameters every tensor-parallel rank holds whole."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.initializers import ones, zeros
from model.layers import describe_replicated
from model.tensor_parallel import TensorParallel


class LayerNorm(nn.LayerNorm):
    """Layer normalization with eps 1e-6 (flax default, big_vision ViT); `partial_gradient`: see ParameterInfo."""

    def __init__(self, width: int, partial_gradient: bool) -> None:
        super().__init__(width, eps=1e-6)
        describe_replicated(self.weight, "weight", ones, partial_gradient)
        describe_replicated(self.bias, "bias", zeros, partial_gradient)

    def snapshot(self) -> Callable[[Tensor], Tensor]:
        """Return the function with the weights of now, which do not follow the parameters' memory."""
        weight, bias = self.weight.detach().clone(), self.bias.detach().clone()
        return lambda x: F.layer_norm(x, weight.shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """T5's layer norm: no mean, no bias, eps 1e-6, statistics in fp32 (T5X `layers.py::LayerNorm`)."""

    def __init__(self, width: int, parallel: TensorParallel) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        describe_replicated(self.weight, "weight", ones, parallel.sequence)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)

    def snapshot(self) -> Callable[[Tensor], Tensor]:
        """Return the function with the weights of now, which do not follow the parameters' memory."""
        weight = self.weight.detach().clone()
        return lambda x: F.rms_norm(x, weight.shape, weight, 1e-6)
