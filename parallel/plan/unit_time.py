"""Compute the seconds of one unit's forward and backward pass for one micro-batch on one rank.

Overlap is that of the code today: Megatron-Core's column-parallel maps run the all-reduce (or reduce-scatter) of the
inputs' gradient beside the weights' gradient, and gather the inputs beside the inputs' gradient; all else is exposed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from model.costs import BatchShape, Unit
from model.vit import VIT_UNITS
from parallel.config import ParallelConfig
from parallel.plan.collectives import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Exchange, Group, exposed_s
from parallel.plan.hardware import Hardware
from parallel.plan.memory import alone, with_own_images
from parallel.plan.operators import Attention, Linear, Operators, Vocabulary, operators

FLASH_BACKWARD = 2.5  # FLOPs of a fused backward pass over the forward pass: scores again (Dao 2023, section 3.1)
SCORE_PASSES = 8  # reads and writes of the scores where attention is not fused: product, bias, mask, softmax, product
LOGIT_PASSES = 10  # of fp32 logits in the loss: product, largest, shift, exponent, sum, scale, scatter, to 16 bits
FP32 = 4  # bytes


@dataclass(frozen=True)
class Pass:
    """Seconds of one pass of a unit: its own work, and tensor-parallel collectives that no work hides.

    `exchanges` are all of its tensor-parallel collectives; they may run beside its work.
    """

    compute_s: float = 0.0
    tensor_s: float = 0.0
    exchanges: tuple[Exchange, ...] = ()

    def __add__(self, other: "Pass") -> "Pass":
        both = self.compute_s + other.compute_s, self.tensor_s + other.tensor_s
        return Pass(*both, self.exchanges + other.exchanges)

    @property
    def total_s(self) -> float:
        """Return the seconds of the pass."""
        return self.compute_s + self.tensor_s


@dataclass(frozen=True)
class UnitTime:
    """Seconds of a unit for one micro-batch."""

    forward: Pass
    backward: Pass

    @property
    def total_s(self) -> float:
        """Return the seconds of both passes."""
        return self.forward.total_s + self.backward.total_s


@dataclass(frozen=True)
class UnitClock:
    """Compute times of units under one layout on one kind of hardware; `fused`: T5's attention is one kernel."""

    hardware: Hardware
    parallel: ParallelConfig
    tensor_group: Group
    shape: BatchShape
    fused: bool

    def for_unit(self, unit: Unit) -> "UnitClock":
        """Return the clock of a unit by itself: that of one rank, where each holds the ViT whole."""
        if not (self.parallel.replicate_frozen_vit and isinstance(unit, VIT_UNITS)):
            return self
        shape = with_own_images(self.shape, self.parallel)
        return replace(self, parallel=alone(self.parallel), tensor_group=Group(1, 1), shape=shape)

    def time(self, unit: Unit, trained: bool, below_trained: bool) -> UnitTime:
        """Return the seconds of a unit; a frozen unit below everything trained has no backward pass."""
        work = operators(unit, self.shape, self.fused)
        forward = self._forward(work)
        if not trained and not below_trained:
            return UnitTime(forward, Pass())
        backward = self._backward(work, trained, below_trained)
        if unit.recompute == "block":
            backward += self._pass(forward.compute_s, list(forward.exchanges[:-1]))
        elif unit.recompute == "attention":
            backward += Pass(sum(self._attention_s(each) for each in work.attentions if not each.fused))
        else:
            backward += Pass(self._elementwise_again_s(work, unit.recompute))
        return UnitTime(forward, backward)

    def encoder_output(self, d_model: int, with_gradient: bool) -> UnitTime:
        """Return the seconds in which the encoder's output is gathered for decoder blocks, and its gradient summed."""
        size = self._bytes(self.shape.rows * self.shape.encoder_tokens, d_model)
        summed = [self._reduced(size)] if with_gradient else []
        return UnitTime(self._pass(0.0, self._gathered(size)), self._pass(0.0, summed))

    def _pass(self, compute_s: float, exchanges: Sequence[Exchange]) -> Pass:
        if self.parallel.tensor == 1:
            return Pass(compute_s)
        exposed = sum(exposed_s(each, self.tensor_group, self.hardware) for each in exchanges)
        return Pass(compute_s, exposed, tuple(exchanges))

    def _reduced(self, whole_bytes: float, beside_s: float = 0.0) -> Exchange:
        """Return the sum of a tensor over the ranks; each keeps its sequence shard or the whole."""
        return Exchange(REDUCE_SCATTER if self.parallel.sequence else ALL_REDUCE, whole_bytes, beside_s)

    def _gathered(self, whole_bytes: float, beside_s: float = 0.0) -> list[Exchange]:
        """Return the collective in which sequence shards become whole sequences; none without such shards."""
        return [Exchange(ALL_GATHER, whole_bytes, beside_s)] if self.parallel.sequence else []

    def _elementwise_again_s(self, work: Operators, recompute: str) -> float:
        """Return the seconds of the norms and of the MLP's activation that the backward pass runs again."""
        t, size, total = self.parallel.tensor, self.shape.element_bytes, 0.0
        if recompute in ("norm", "elementwise") and work.norms:
            moved = size * work.norm_elements / (t if self.parallel.sequence else 1)
            total += self.hardware.elementwise_s(moved, work.norms)
        if recompute in ("mlp", "elementwise") and work.mlp_elements:
            total += self.hardware.elementwise_s(size * work.mlp_elements / t, 1)
        return total

    def _forward(self, work: Operators) -> Pass:
        compute = self._elementwise_s(work, 1.0) + sum(self._attention_s(each) for each in work.attentions)
        compute += sum(self._product_s(each) for each in work.linears)
        size, sent = self.shape.element_bytes, []
        if work.embedded_tokens:  # ranks look up the words of their own part of the table
            sent.append(Exchange(ALL_REDUCE, self._bytes(work.embedded_tokens, work.embedded_width)))
        for linear in work.linears:
            if linear.split == "column":
                sent += self._gathered(self._bytes(linear.tokens, linear.d_in))
            elif linear.split == "row":
                sent.append(self._reduced(self._bytes(linear.tokens, linear.d_out)))
        if self._divides_visual:
            sent += [Exchange(ALL_GATHER, size * elements) for elements in work.gathered]
        if head := work.vocabulary:
            compute += self._vocabulary_s(head)
            sent += self._gathered(self._bytes(head.tokens, head.d_model))
            for tokens in _chunks(head):  # the largest logit; the sum of exponents and the target's logit
                sent += [Exchange(ALL_REDUCE, FP32 * tokens), Exchange(ALL_REDUCE, 2 * FP32 * tokens)]
        return self._pass(compute, sent)

    def _backward(self, work: Operators, trained: bool, below_trained: bool) -> Pass:
        compute = self._elementwise_s(work, 2.0)
        compute += sum(self._attention_s(each, backward=True) for each in work.attentions)
        sent = [each for elements in work.scattered for each in self._gathered(self.shape.element_bytes * elements)]
        total = self._pass(compute, sent)
        for linear in work.linears:
            total += self._linear_backward(linear, trained)
        if head := work.vocabulary:
            scaled = FP32 * head.d_model * (head.tokens + head.size / self.parallel.tensor)
            summed = self._reduced(self._bytes(head.tokens, head.d_model))
            total += self._pass(self.hardware.elementwise_s(scaled, 2), [summed])
        if work.embedded_tokens and trained:  # a dense gradient of the table: zeros, then one row for every token
            total += Pass(self._table_s(work.embedded_width, work.embedded_tokens))
        return total

    def _table_s(self, d_model: int, tokens: int) -> float:
        return self.hardware.elementwise_s(3.0 * self.shape.element_bytes * tokens * d_model, 3)

    def _product_s(self, linear: Linear) -> float:
        rows, columns, inner = self._local(linear)
        return self.hardware.product_s(rows, columns, inner, self.shape.element_bytes)

    def _local(self, linear: Linear) -> tuple[float, float, float]:
        """Return (rows, columns, inner) of a rank's product."""
        t = self.parallel.tensor
        if linear.split in ("column", "memory"):
            return linear.tokens, linear.d_out / t, linear.d_in
        if linear.split == "row":
            return linear.tokens, linear.d_out, linear.d_in / t
        return linear.tokens / (t if self._divides_visual else 1), linear.d_out, linear.d_in

    def _bytes(self, tokens: int, width: int) -> float:
        return float(self.shape.element_bytes * tokens * width)

    @property
    def _divides_visual(self) -> bool:
        """Return whether a rank projects a part of the visual tokens: of their positions, or of the images."""
        return self.parallel.sequence or self.parallel.replicate_frozen_vit

    def _linear_backward(self, linear: Linear, trained: bool) -> Pass:
        """Return both gradients of a map; a frozen one has none of its weights."""
        rows, columns, inner = self._local(linear)
        size = self.shape.element_bytes
        inputs = self.hardware.product_s(rows, inner, columns, size)
        weights = self.hardware.product_s(inner, columns, rows, size) if trained else 0.0
        whole = self._bytes(linear.tokens, linear.d_in)
        sent: list[Exchange] = []
        if linear.split == "row":
            sent += self._gathered(self._bytes(linear.tokens, linear.d_out))
        elif linear.split == "column":
            sent += self._gathered(whole, inputs) if trained else []
            sent.append(self._reduced(whole, weights))
        return self._pass(inputs + weights, sent)

    def _attention_s(self, attention: Attention, backward: bool = False) -> float:
        t, size = self.parallel.tensor, self.shape.element_bytes
        if attention.fused:
            factor = FLASH_BACKWARD if backward else 1.0
            moved = attention.io_elements * (2 if backward else 1)
        else:
            factor = 2.0 if backward else 1.0
            moved = attention.io_elements * factor + SCORE_PASSES * attention.score_elements
        launches = (2 if backward else 1) if attention.fused else SCORE_PASSES
        return self.hardware.attention_s(factor * attention.flops / t, moved * size / t, size, launches)

    def _elementwise_s(self, work: Operators, passes: float) -> float:
        t = self.parallel.tensor
        stream = work.stream_elements / (t if self.parallel.sequence else 1)
        moved = passes * self.shape.element_bytes * (stream + work.inner_elements / t)
        return self.hardware.elementwise_s(moved, passes * work.launches)

    def _vocabulary_s(self, head: Vocabulary) -> float:
        """Return the loss with its gradients: three products a chunk, passes over fp32 logits, sums over chunks."""
        columns, size = head.size / self.parallel.tensor, self.shape.element_bytes
        total = 0.0
        for tokens in _chunks(head):
            total += self.hardware.product_s(tokens, columns, head.d_model, size)
            total += self.hardware.product_s(tokens, head.d_model, columns, size)
            total += self.hardware.product_s(columns, head.d_model, tokens, size)
            total += self.hardware.elementwise_s(LOGIT_PASSES * FP32 * tokens * columns, 16)
            if head.tokens > head.chunk:  # the gradient's sum over chunks, in fp32
                total += self.hardware.elementwise_s(3 * FP32 * columns * head.d_model, 8)
        return total


def _chunks(head: Vocabulary) -> list[int]:
    """Return the targets of every chunk of the loss."""
    full, rest = divmod(head.tokens, head.chunk)
    return [head.chunk] * full + [rest] * (rest > 0)
