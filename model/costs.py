"""What a unit costs: parameters, FLOPs, activation bytes. Each formula stands next to the unit it describes."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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
    """Of one unit: parameters (count), forward FLOPs (2 per multiply-add), bytes kept for its backward pass.

    Of those bytes, where a unit can be recomputed: its inputs, and what only attention keeps.
    """

    parameters: int = 0
    flops: float = 0.0
    activation_bytes: float = 0.0
    input_bytes: float = 0.0
    attention_bytes: float = 0.0


class Unit(nn.Module):
    """One step of the forward pass that knows its price; what a pipeline cuts between.

    `recompute`: what is computed again in the backward pass instead of kept: "none", "attention" (scores and their
    softmax, whose size is the square of the length), or "block" (everything but the unit's inputs).
    """

    recompute = "none"

    def attend(self, attention: Callable[..., Tensor], *inputs: object) -> Tensor:
        """attention(*inputs), recomputed where that is asked."""
        if self.recompute == "attention" and torch.is_grad_enabled():
            return checkpoint(attention, *inputs, use_reentrant=False)
        return attention(*inputs)

    def cost(self, shape: BatchShape) -> Cost:
        """Of the whole unit, on one tensor-parallel rank of one."""
        raise NotImplementedError

    @property
    def trained(self) -> bool:
        """Whether any of its parameters is."""
        return any(parameter.requires_grad for parameter in self.parameters())


@dataclass(frozen=True)
class UnitCost:
    """A unit's cost in its place: `training_flops` forward and backward, `kept_bytes` until the backward pass."""

    name: str
    unit: Unit
    cost: Cost
    trained: bool
    training_flops: float
    kept_bytes: float


def unit_costs(units: Iterable[tuple[str, Unit]], shape: BatchShape) -> Iterator[UnitCost]:
    """The units in their order, frozen or not as they are now: what lies below everything trained keeps nothing."""
    below_trained = False
    for name, unit in units:
        cost, trained = unit.cost(shape), unit.trained
        kept = kept_bytes(cost, unit.recompute) if trained or below_trained else 0.0
        yield UnitCost(name, unit, cost, trained, training_flops(cost.flops, trained, below_trained), kept)
        below_trained |= trained


def kept_bytes(cost: Cost, recompute: str) -> float:
    """What is kept until the backward pass, where `Unit.recompute` says what is computed again then."""
    return {
        "none": cost.activation_bytes,
        "attention": cost.activation_bytes - cost.attention_bytes,
        "block": cost.input_bytes,
    }[recompute]


def batch_flops(units: Iterable[tuple[str, Unit]], shape: BatchShape) -> float:
    """Forward and backward FLOPs of one batch of that shape, for the units as they are frozen now."""
    return sum(unit.training_flops for unit in unit_costs(units, shape))


def linear_flops(tokens: int, d_in: int, d_out: int) -> float:
    """A matrix product: 2 FLOPs per multiply-add."""
    return 2.0 * tokens * d_in * d_out


def attention_flops(rows: int, queries: int, keys: int, inner: int) -> float:
    """Scores and weighted sum, counted full (not causal): 4 Lq Lk inner per row."""
    return 4.0 * rows * queries * keys * inner


def training_flops(forward: float, trained: bool, below_trained: bool) -> float:
    """Forward and backward FLOPs of a unit.

    A trained unit pays the forward pass twice more (gradients of inputs and of weights); a frozen one above anything
    trained once more (gradients of inputs); a frozen one below everything trained nothing.
    """
    return forward * (3 if trained else 2 if below_trained else 1)
