"""Plain data parallelism (ZeRO stage 0): every rank holds its tensor-parallel block whole; gradients are summed once a
step.

It needs nothing but torch, so it is also what the sharded engines are compared with.
"""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.layers import parameter_parts
from parallel.engine.base import Engine, make_optimizer, reduce_partial_gradients
from parallel.optimizer.base import Shard
from parallel.plan.blueprint import Blueprint, materialize
from parallel.shards import Rectangle, count_once, rectangles

BUCKET_ELEMENTS = 2**24  # gradients travel in pieces of at most so many elements (64 MiB of fp32)


class ReplicatedEngine(Engine):
    """Under bf16 each trained parameter has an fp32 copy, in which it is updated and, over several micro-batches,
    accumulated."""

    def __init__(self, blueprint: Blueprint) -> None:
        layout, dtype = blueprint.layout, blueprint.dtype
        pali = materialize(blueprint)
        reduce_partial_gradients(pali, layout)
        self.trained = [p for p in pali.parameters() if p.requires_grad]
        self.weights = [
            p.detach().flatten() if dtype == torch.float32 else p.detach().float().flatten() for p in self.trained
        ]
        for weights in self.weights:
            weights.grad_dtype = None  # takes the 16-bit gradient of a step's only micro-batch as it is
        self.clipping = blueprint.optimizer.gradient_clipping
        self.accumulated: list[Tensor] | None = None
        super().__init__(blueprint, pali, make_optimizer(self.trained, blueprint.optimizer), layout.tensor_group)
        self.optimizer.param_groups[0]["params"] = self.weights

    def shards(self) -> list[Shard]:
        weights = iter(self.weights)
        return [Shard(next(weights), pieces) for p, pieces in self._pieces() if p.requires_grad]

    def frozen_pieces(self) -> list[tuple[Rectangle, Tensor]]:
        return [
            (r, r.view(p.detach().flatten())) for p, pieces in self._pieces() if not p.requires_grad for r in pieces
        ]

    def _pieces(self) -> list[tuple[nn.Parameter, list[Rectangle]]]:
        """Every parameter, in the model's order, with the rectangles it is made of."""
        found: dict[nn.Parameter, list[Rectangle]] = {}
        for p, part in parameter_parts(self.model):
            once = count_once(p, self.layout.tensor_parallel_rank)
            found.setdefault(p, []).extend(rectangles([part], 0, p.numel(), 0, once))
        return list(found.items())

    @torch.no_grad()
    def publish(self) -> None:
        for p, w in zip(self.trained, self.weights, strict=True):
            if p.dtype != w.dtype:
                p.copy_(w.view_as(p))

    def backward(self, loss: Tensor) -> None:
        if any(p.grad is not None for p in self.trained) and self.trained[0].dtype != torch.float32:
            self._accumulate_in_fp32()
        loss.backward()

    def _accumulate_in_fp32(self) -> None:
        """Move gradients out of the parameters, so that sums over micro-batches and ranks are not rounded to 16
        bits."""
        gradients = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in self.trained]
        if self.accumulated is None:
            self.accumulated = [gradient.float() for gradient in gradients]
        else:
            torch._foreach_add_(self.accumulated, gradients)
        for p in self.trained:
            p.grad = None

    @torch.no_grad()
    def apply_update(self) -> float:
        if self.accumulated is not None or self.layout.data_parallel_size > 1:
            self._accumulate_in_fp32()
        gradients = self.accumulated or [p.new_zeros(p.shape) if p.grad is None else p.grad for p in self.trained]
        self.accumulated = None
        self._sum_over_data(gradients)
        norm = self._norm(gradients)
        if math.isfinite(norm):
            if self.clipping is not None and norm > self.clipping:
                torch._foreach_mul_(gradients, self.clipping / norm)
            for weights, gradient in zip(self.weights, gradients, strict=True):
                weights.grad = gradient.flatten()
            self.optimizer.step()
            self.publish()
        for p, weights in zip(self.trained, self.weights, strict=True):
            p.grad = weights.grad = None
        return norm

    def _sum_over_data(self, gradients: list[Tensor]) -> None:
        if self.layout.data_parallel_size == 1:
            return
        for bucket in _buckets(gradients):
            flat = self.layout.all_reduce_data(torch.cat([g.flatten() for g in bucket]))
            for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def _norm(self, gradients: list[Tensor]) -> float:
        """Of the whole model: every logical element is counted once over the tensor-parallel ranks."""
        squares = torch.zeros((), dtype=torch.float64, device=self.layout.device)
        for p, gradient in zip(self.trained, gradients, strict=True):
            if count_once(p, self.layout.tensor_parallel_rank):
                squares += squared_norm(gradient)
        dist.all_reduce(squares, group=self.layout.model_group)
        return float(squares.sqrt())


def squared_norm(x: Tensor) -> Tensor:
    """Sum of squares in fp64; torch's own norm on a CPU adds in fp32, one after another, and is off by 1e-5."""
    pieces = x.flatten().split(2**26 if x.is_cuda else 2**18)
    return torch.stack([piece.float().square().sum(dtype=torch.float64) for piece in pieces]).sum()


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
