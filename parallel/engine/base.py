"""Define the interface of every engine: accumulate gradients, update, evaluate, generate.

parallel/engine/build.py makes engines; its docstring gives the order.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.progress import beat
from model.batch import MicroBatch
from model.generation import Decoder, generate, score
from model.layers import parameter_parts
from model.loss import LossTotals
from model.pali import PaLI
from model.weights.big_vision import flax_layouts
from parallel.copy_stream import CopyStream
from parallel.optimizer.base import Shard, ShardedOptimizer
from parallel.pipeline.decoder import PipelineDecoder
from parallel.pipeline.schedule import Pipeline
from parallel.plan.blueprint import Ballast, Blueprint, ShardUnit
from parallel.shards import Rectangle


class Engine(ABC):
    """Train and run a model, whatever ranks hold its parameters; every method is a collective.

    A step is `forward_backward`, then `measure`, which waits for the device once, then `update` or `discard`. A
    subclass accumulates and sums gradients, and maps the shards. Its constructor sets `optimizer`, and `sharing_group`:
    the ranks over which the elements of each trained logical tensor are divided.
    """

    optimizer: ShardedOptimizer
    sharing_group: dist.ProcessGroup
    gradients: list[Tensor] | None = None  # summed over ranks, one for each of `flat_weights`, until the step ends
    grad_norm: float | None = None  # of these; None until they are measured

    def __init__(self, blueprint: Blueprint, model: PaLI) -> None:
        """Take this rank's filled units; the optimizer has no state until `bind_optimizer`."""
        self.blueprint, self.layout, self.model = blueprint, blueprint.layout, model
        self.pipeline = Pipeline(blueprint, model, self.backward) if len(blueprint.stages) > 1 else None
        self.copies = CopyStream(self.layout.device)

    @classmethod
    def prepare(cls, blueprint: Blueprint) -> ShardUnit:
        """Start what the engine needs before a parameter exists; return the function that shards a filled unit.

        By default nothing is started and units stay whole. A collective.
        """
        return lambda unit: None

    def bind_optimizer(self) -> None:
        """Make the optimizer's state for this rank's shards; called once, after construction."""
        trained = [part for parameter, part in parameter_parts(self.model) if parameter.requires_grad]
        shapes, layouts = {part.name: part.shape for part in trained}, flax_layouts(self.blueprint.config)
        self.optimizer.bind(self.shards(), shapes, self.sharing_group, layouts)

    @abstractmethod
    def shards(self) -> list[Shard]:
        """Return the flat fp32 weights that this rank updates."""

    @abstractmethod
    def frozen_rectangles(self) -> list[tuple[Rectangle, Tensor]]:
        """Return this rank's part of the parameters that are not trained."""

    def held_weights(self) -> list[tuple[Rectangle, Tensor]]:
        """Return this rank's part of every parameter: trained (fp32) or frozen (in the compute precision)."""
        trained = [(r, r.view(shard.weights.detach())) for shard in self.shards() for r in shard.rectangles]
        return trained + self.frozen_rectangles()

    @abstractmethod
    def publish(self) -> None:
        """Copy the fp32 weights, after they were loaded, into the parameters that the model computes with."""

    @abstractmethod
    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Accumulate the gradients of one micro-batch; `last`: of this step, in this pipeline stage."""

    @abstractmethod
    def sum_gradients(self) -> tuple[list[Tensor], Tensor]:
        """Return the step's gradients, summed over ranks and one for each of `flat_weights`, and forget them.

        Return their squared norm too, an fp64 scalar on the device: that of the whole model, in which each logical
        element counts once over all ranks. Nothing here waits for the device.
        """

    @abstractmethod
    def flat_weights(self) -> list[Tensor]:
        """Return the flat fp32 weights that the optimizer updates on this rank."""

    def publish_update(self) -> None:
        """Copy the weights that an update has changed into the parameters that the model computes with."""
        self.publish()

    def forward_backward(self, micro_batches: Sequence[MicroBatch], num_targets: int) -> LossTotals:
        """Accumulate gradients of the micro-batches; return totals summed over the data-parallel ranks.

        `num_targets`: target tokens of the step on all ranks, so that the gradient is that of the mean over all of
        them.
        """
        mean = self.blueprint.config.model.loss_reduction == "mean"
        scale = 1 / max(num_targets, 1) if mean else 1.0
        batches = self._on_device(micro_batches)
        self.model.train()
        if self.pipeline is not None:
            return self._reduce(self.pipeline.run(batches, train=True, loss_scale=scale))
        totals = []
        for number, batch in enumerate(batches, 1):
            output = self.model((), batch, loss_scale=scale)
            self.backward(output.loss, number == len(batches))
            totals.append(output.totals)
            beat()  # a step of many micro-batches may take minutes
        return self._reduce(totals)

    @torch.no_grad()
    def measure(self, totals: LossTotals) -> tuple[LossTotals, float]:
        """Sum the gradients over ranks; return the step's totals and the gradient norm before clipping, on the host.

        Both are read in one copy: the only wait of a step for the device.
        """
        squares = self._sum_once()
        sums = totals.stacked()
        message = torch.cat([sums.double().flatten(), squares.view(1)])
        *values, squared = message.tolist()
        self.grad_norm = math.sqrt(squared)
        return LossTotals.from_tensor(torch.tensor(values).view_as(sums)), self.grad_norm

    def _sum_once(self) -> Tensor:
        """Sum the gradients of the step over ranks, and return their squared norm."""
        if isinstance(ballast := getattr(self.model, "ballast", None), Ballast):
            with torch.enable_grad():
                self.backward(ballast())
        self.gradients, squares = self.sum_gradients()
        return squares

    @torch.no_grad()
    def update(self, learning_rate: float) -> float:
        """Update every trained parameter; return the global gradient norm before clipping.

        A norm that is not finite skips the update. Gradients that `measure` has not summed are summed first.
        """
        if self.grad_norm is None:
            self.grad_norm = math.sqrt(float(self._sum_once()))
        norm, gradients = self.grad_norm, self.gradients or []
        if math.isfinite(norm):
            clipping = self.blueprint.optimizer.gradient_clipping
            if clipping is not None and norm > clipping:
                torch._foreach_mul_(gradients, clipping / norm)
            self._apply(gradients, learning_rate)
        self.gradients = self.grad_norm = None
        return norm

    def _apply(self, gradients: list[Tensor], learning_rate: float) -> None:
        weights = self.flat_weights()
        for flat, gradient in zip(weights, gradients, strict=True):
            flat.grad = gradient
        self.optimizer.set_learning_rate(learning_rate)
        self.optimizer.step()
        for flat in weights:
            flat.grad = None
        self.publish_update()

    @torch.no_grad()
    def discard(self) -> None:
        """End a step without an update: drop its gradients. Ranks sum them all the same, unless `measure` has."""
        if self.gradients is None:
            self._sum_once()
        self.gradients = self.grad_norm = None

    @torch.no_grad()
    def parted_parameter(self) -> str | None:
        """Return a parameter whose copies differ, in any bit, between data-parallel ranks; a collective of the world.

        Replicas compute the same, so a difference comes from faulty hardware or another order of sums, and grows. Under
        ZeRO-3 no rank has a copy, and the result is None. Copies on tensor-parallel ranks are not compared.
        """
        if self.layout.config.zero_stage == 3 or self.layout.world_size == 1:
            return None
        named = [(name, p.detach()) for name, p in self.model.named_parameters()]
        named += [(f"fp32 weights {number}", copy) for number, copy in enumerate(self.copied_weights())]
        hashes = torch.stack([bits_sum(x) for _, x in named])
        both = torch.cat([hashes, -hashes])
        self.layout.all_reduce_data(both, dist.ReduceOp.MAX)
        largest, smallest = both[: len(named)], -both[len(named) :]
        parted = (largest != smallest).nonzero().flatten().tolist()
        if not self.layout.any_rank(bool(parted)):
            return None
        return self.layout.gather_objects([named[i][0] for i in parted[:1]])[0]

    def copied_weights(self) -> list[Tensor]:
        """Return the fp32 weights that every data-parallel rank holds whole, besides the model's parameters."""
        return []

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Compute with the average of the weights in the body, where the optimizer has one; a collective.

        The weights and their average change places, so that no third copy of the whole is made.
        """
        with torch.no_grad():
            self._exchange_averages()
        try:
            yield
        finally:
            with torch.no_grad():
                self._exchange_averages()

    def _exchange_averages(self) -> None:
        if not self.optimizer.averaged:
            return
        for shard in self.shards():
            for r in shard.rectangles:
                weights, average = r.view(shard.weights.detach()), self.optimizer.averages[r]
                kept = weights.clone()
                weights.copy_(average)
                average.copy_(kept)
        self.publish()

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> LossTotals:
        """Return totals over the micro-batches of all data-parallel ranks, without gradients."""
        self.model.eval()
        batches = self._on_device(micro_batches)
        if self.pipeline is not None:
            return self._reduce(self.pipeline.run(batches, train=False))
        return self._reduce([self.model((), batch).totals for batch in batches])

    @torch.no_grad()
    def generate(self, batch: MicroBatch, max_new_tokens: int, **search: Any) -> Tensor:
        """Generate a text for each row: int64 [B, <= max_new_tokens], EOS included, then pad.

        One example per row of the batch. `search`: fields of `model.search.Search`, greedy by default.
        """
        batch = batch.to(self.layout.device)
        together = self.layout.data_group
        return generate(self.model, batch, max_new_tokens, together, self._decoder(batch), **search)

    @torch.no_grad()
    def score(self, batch: MicroBatch, targets: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """Return the log-probability (nats) of N given texts for each row of the batch: fp32 [B, N].

        `targets`: their ids, each with EOS. Under ZeRO-3 all data-parallel ranks must have equal lengths.
        """
        batch = batch.to(self.layout.device)
        return score(self.model, batch, targets, self._decoder(batch))

    def _decoder(self, batch: MicroBatch) -> Decoder | None:
        return None if self.pipeline is None else PipelineDecoder(self.pipeline, batch)

    def _on_device(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Copy to the device, with text lengths that sequence parallelism can divide."""
        multiple = self.layout.config.tensor if self.layout.config.sequence else 1
        return self.copies.copy([batch.padded(multiple) for batch in micro_batches])

    def _reduce(self, totals: list[Tensor]) -> LossTotals:
        """Sum totals over micro-batches and data-parallel ranks; only the last stage of a pipeline gives any."""
        nothing = torch.zeros(4, self.blueprint.config.num_objectives, device=self.layout.device)
        summed = torch.stack([nothing, *totals]).sum(0)
        if self.layout.world_size > 1:  # over the world in one sum -> all ranks get the same bits and decide alike
            dist.all_reduce(summed)
        return LossTotals.from_tensor(summed / self.layout.config.tensor)


def bits_sum(x: Tensor) -> Tensor:
    """Return the sum of a tensor's bit patterns as int64, which any changed bit changes; NaN counts as any other."""
    integer = {2: torch.int16, 4: torch.int32}[x.element_size()]
    return x.contiguous().view(integer).sum(dtype=torch.int64)
