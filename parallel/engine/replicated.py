"""Train with plain data parallelism (ZeRO stage 0): replicas hold equal parameters and sum gradients once a step.

It needs torch alone, so tests compare the sharded engines with it.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.layers import parameter_info, parameter_parts
from model.pali import PaLI
from parallel.engine.base import Engine
from parallel.optimizer.base import Shard, optimizer_class
from parallel.plan.blueprint import Blueprint
from parallel.plan.buckets import REPLICATED_BUCKET
from parallel.shards import Rectangle, is_counted, rectangles


class ReplicatedEngine(Engine):
    """Update whole tensor-parallel blocks on every data-parallel rank.

    Under bf16 each trained parameter has an fp32 copy, which is updated. Gradients of several micro-batches are
    accumulated in fp32 too.
    """

    def __init__(self, blueprint: Blueprint, model: PaLI) -> None:
        super().__init__(blueprint, model)
        self.sharing_group = self.layout.tensor_group
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.weights = [
            p.detach().flatten() if p.dtype == torch.float32 else p.detach().float().flatten() for p in self.trained
        ]
        for weights in self.weights:
            weights.grad_dtype = None  # takes the 16-bit gradient of a step's only micro-batch as it is
        self.accumulated: list[Tensor] | None = None
        self.optimizer = optimizer_class(blueprint.optimizer)(self.trained, blueprint.optimizer)
        self.optimizer.param_groups[0]["params"] = self.weights

    def shards(self) -> list[Shard]:
        """See Engine.shards."""
        weights = iter(self.weights)
        return [Shard(next(weights), found) for p, found in self._rectangles() if p.requires_grad]

    def frozen_rectangles(self) -> list[tuple[Rectangle, Tensor]]:
        """See Engine.frozen_rectangles."""
        frozen = [(p, found) for p, found in self._rectangles() if not p.requires_grad]
        return [(r, r.view(p.detach().flatten())) for p, found in frozen for r in found]

    def copied_weights(self) -> list[Tensor]:
        """See Engine.copied_weights."""
        return self.weights

    def _rectangles(self) -> list[tuple[nn.Parameter, list[Rectangle]]]:
        """List every parameter, in the model's order, with its rectangles."""
        found: dict[nn.Parameter, list[Rectangle]] = {}
        for p, part in parameter_parts(self.model):
            counted = is_counted(p, self.layout.tensor_parallel_rank)
            found.setdefault(p, []).extend(rectangles([part], 0, p.numel(), 0, counted))
        return list(found.items())

    @torch.no_grad()
    def publish(self) -> None:
        """See Engine.publish."""
        for p, w in zip(self.trained, self.weights, strict=True):
            if p.dtype != w.dtype:
                p.copy_(w.view_as(p))

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """See Engine.backward."""
        if any(p.grad is not None for p in self.trained) and self.trained[0].dtype != torch.float32:
            self._accumulate_in_fp32()
        loss.backward()

    def _accumulate_in_fp32(self) -> None:
        """Move gradients from the parameters into fp32: sums in 16 bits would be rounded."""
        gradients = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in self.trained]
        if self.accumulated is None:
            self.accumulated = [gradient.float() for gradient in gradients]
        else:
            torch._foreach_add_(self.accumulated, gradients)
        for p in self.trained:
            p.grad = None

    def flat_weights(self) -> list[Tensor]:
        """See Engine.flat_weights."""
        return self.weights

    def sum_gradients(self) -> tuple[list[Tensor], Tensor]:
        """See Engine.sum_gradients."""
        if self.accumulated is not None or self.layout.data_parallel_size > 1:
            self._accumulate_in_fp32()
        gradients = self.accumulated or [p.new_zeros(p.shape) if p.grad is None else p.grad for p in self.trained]
        self.accumulated = None
        for p in self.trained:
            p.grad = None
        self._join_copies(gradients)
        self._sum_over_data(gradients)
        return [gradient.flatten() for gradient in gradients], self._squares(gradients)

    def _join_copies(self, gradients: list[Tensor]) -> None:
        """Make gradients equal, to the last bit, where every tensor-parallel rank holds the parameter whole.

        One message in fp32 for all of them: partial gradients are summed, and of whole ones that of rank 0 is taken.
        """
        group, first = self.layout.tensor_group, self.layout.tensor_parallel_rank == 0
        infos = [parameter_info(p) for p in self.trained]
        copies = [i for i, info in enumerate(infos) if not info.split]
        if group.size() == 1 or not copies:
            return
        flat = torch.cat([gradients[i].float().flatten() * (first or infos[i].partial_gradient) for i in copies])
        dist.all_reduce(flat, group=group)
        for i, joined in zip(copies, flat.split([gradients[i].numel() for i in copies]), strict=True):
            gradients[i] = joined.view_as(gradients[i])

    def _sum_over_data(self, gradients: list[Tensor]) -> None:
        if self.layout.data_parallel_size == 1:
            return
        for bucket in _buckets(gradients):
            flat = torch.cat([g.flatten() for g in bucket])
            flat = self.layout.all_reduce_data(flat.bfloat16() if self.layout.config.reduce_dtype == "bf16" else flat)
            for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def _squares(self, gradients: list[Tensor]) -> Tensor:
        squares = torch.zeros((), dtype=torch.float64, device=self.layout.device)
        for p, gradient in zip(self.trained, gradients, strict=True):
            if is_counted(p, self.layout.tensor_parallel_rank):
                squares += squared_norm(gradient)
        dist.all_reduce(squares, group=self.layout.model_group)
        return squares


def squared_norm(x: Tensor) -> Tensor:
    """Sum squares in fp64: torch's own norm on a CPU adds up in fp32, one by one, and is off by 1e-5."""
    pieces = x.flatten().split(2**26 if x.is_cuda else 2**18)
    return torch.stack([piece.float().square().sum(dtype=torch.float64) for piece in pieces]).sum()


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > REPLICATED_BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
