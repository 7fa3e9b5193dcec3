"""The cost of a unit: parameters, FLOPs, activation bytes. Each formula is next to the unit that it describes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.recompute import recomputed


@dataclass(frozen=True)
class BatchShape:
    """The size of a batch: `images` x `vision_tokens` patch tokens, and `rows` of encoder and decoder tokens.

    One unpacked example of the paper: images=1, rows=1, encoder_tokens = visual + input text, decoder_tokens = target
    text. `element_bytes` is the size of an activation: 2 for bf16, 4 for fp32.
    """

    images: int
    vision_tokens: int
    rows: int
    encoder_tokens: int
    decoder_tokens: int
    element_bytes: int = 2


@dataclass(frozen=True)
class Cost:
    """The cost of one unit for one batch, before tensor parallelism."""

    parameters: int = 0
    """Number of elements."""
    flops: float = 0.0
    """FLOPs of the forward pass, 2 per multiply-add."""
    activation_bytes: float = 0.0
    """Bytes kept for the backward pass without recomputation."""
    input_bytes: float = 0.0
    """Bytes of the unit's inputs: all that is kept under recompute "block"."""
    attention_bytes: float = 0.0
    """Bytes of attention weights among `activation_bytes`: not kept under recompute "attention"."""
    mlp_bytes: float = 0.0
    """Bytes that the MLP's activation adds to its inputs: not kept under recompute "mlp"."""
    norm_bytes: float = 0.0
    """Bytes of the results of norms: not kept under recompute "norm"."""


class Unit(nn.Module):
    """One step of the forward pass, with its cost; a pipeline cuts between units.

    Forward: (carry, batch) -> carry. `recompute` chooses the activations that the backward pass computes again instead
    of keeping them: "none", "attention" (scores and their softmax, quadratic in the length), "mlp" (the activation of
    the MLP), "norm" (the results of norms), "elementwise" (both), or "block" (all but the unit's inputs).
    """

    recompute = "none"
    gives_loss = False  # the last unit: it takes `loss_scale` too, and returns a `HeadOutput`

    def recomputes(self, kind: str) -> bool:
        """Return whether this forward pass leaves out activations of a kind, "mlp" or "norm"."""
        return self.recompute in (kind, "elementwise") and torch.is_grad_enabled()

    def after_norm(self, norm: Any, x: Tensor, linear: nn.Module) -> Any:
        """Return linear(norm(x)); under recompute "norm" the norm's result is not kept."""
        normed = norm(x)
        if not self.recomputes("norm"):
            return linear(normed)
        again, inputs = norm.snapshot(), x.detach()
        with recomputed(normed, lambda: again(inputs), linear):
            return linear(normed)

    def cost(self, shape: BatchShape) -> Cost:
        """Return the cost of the whole unit, as one tensor-parallel rank of one."""
        raise NotImplementedError

    @property
    def trained(self) -> bool:
        """True if any of its parameters is trained."""
        return any(parameter.requires_grad for parameter in self.parameters())


@dataclass(frozen=True)
class UnitCost:
    """A unit's cost at its position in the model.

    `training_flops` counts forward and backward pass, `kept_bytes` the activations kept until the backward pass.
    """

    name: str
    unit: Unit
    cost: Cost
    trained: bool
    training_flops: float
    kept_bytes: float


def unit_costs(units: Iterable[tuple[str, Unit]], shape: BatchShape) -> Iterator[UnitCost]:
    """Yield the costs of units in their order, frozen as they are now.

    A frozen unit below everything trained keeps nothing.
    """
    below_trained = False
    for name, unit in units:
        cost, trained = unit.cost(shape), unit.trained
        kept = kept_bytes(cost, unit.recompute) if trained or below_trained else 0.0
        yield UnitCost(name, unit, cost, trained, training_flops(cost.flops, trained, below_trained), kept)
        below_trained |= trained


def kept_bytes(cost: Cost, recompute: str) -> float:
    """Return the bytes kept until the backward pass under a value of `Unit.recompute`."""
    return {
        "none": cost.activation_bytes,
        "attention": cost.activation_bytes - cost.attention_bytes,
        "mlp": cost.activation_bytes - cost.mlp_bytes,
        "norm": cost.activation_bytes - cost.norm_bytes,
        "elementwise": cost.activation_bytes - cost.mlp_bytes - cost.norm_bytes,
        "block": cost.input_bytes,
    }[recompute]


def batch_flops(units: Iterable[tuple[str, Unit]], shape: BatchShape) -> float:
    """Sum forward and backward FLOPs of one batch of that shape, for the units as they are frozen now."""
    return sum(unit.training_flops for unit in unit_costs(units, shape))


def linear_flops(tokens: int, d_in: int, d_out: int) -> float:
    """Return the FLOPs of a matrix product, 2 per multiply-add."""
    return 2.0 * tokens * d_in * d_out


def attention_flops(rows: int, queries: int, keys: int, inner: int) -> float:
    """Return the FLOPs of scores and weighted sum, counted in full (not causal): 4 Lq Lk inner per row."""
    return 4.0 * rows * queries * keys * inner


def training_flops(forward: float, trained: bool, below_trained: bool) -> float:
    """Return forward and backward FLOPs of a unit.

    The backward pass of a trained unit costs two forward passes (gradients of inputs and of weights), that of a frozen
    unit above anything trained one (gradients of inputs), that of a frozen unit below everything trained nothing.
    """
    return forward * (3 if trained else 2 if below_trained else 1)
