"""Train with ZeRO stages 1, 2 and 3 over the data-parallel ranks of every pipeline stage.

Optimizer state and fp32 weights are sharded, bucket by bucket (buckets.py). Gradients are added up in fp32, and
reduce-scattered once a step while its last backward pass goes on (reducer.py). Updated weights are all-gathered; the
large ones of stage 3 are sharded too, and gathered unit by unit around their passes (zero3.py, gathers.py).

DeepSpeed 0.19.8 shards and gathers the parameters of stage 3, with ZeRO++ and offload. Its engine is not used: it
sums gradients in every micro-batch (stages 2 and 3), or all-reduces them after the last one (stage 1). Its
`coalesce_grad_reduction` sends once a step, but not where the caller accumulates, where a pipeline has several stages,
or where bf16 gradients are added up in fp32.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.batch import MicroBatch
from model.layers import parameter_parts
from model.loss import LossTotals
from model.pali import PaLI
from parallel.engine.base import Engine
from parallel.engine.buckets import Bucket, is_divided, make_buckets
from parallel.engine.reducer import Reducer
from parallel.engine.replicated import squared_norm
from parallel.file_backed import Disk
from parallel.optimizer.base import Shard, optimizer_class
from parallel.plan.blueprint import Blueprint, ShardUnit
from parallel.shards import Rectangle, is_counted, rectangles


class ZeroEngine(Engine):
    """Shard over the data-parallel ranks: optimizer state and fp32 weights (1), gradients (2), parameters (3)."""

    def __init__(self, blueprint: Blueprint, model: PaLI) -> None:
        """Take the units; `prepare` has run, and has sharded those of stage 3."""
        super().__init__(blueprint, model)
        layout, config = self.layout, self.layout.config
        self.sharing_group = layout.stage_group
        self.disk = Disk(config.offload_folder or "")
        stages = [self._stage_buckets(names) for names in self._stage_names()]
        self.buckets = [bucket for buckets in stages for bucket in buckets]
        for bucket in self.buckets:
            self._copy_weights(bucket)
        self.gathers: Any = None
        send = None
        if config.zero_stage == 3:
            send = self._start_gathers()
        self.reducer = Reducer(stages, layout, send)
        trained = [p for bucket in self.buckets for p in bucket.parameters]
        self.optimizer = optimizer_class(blueprint.optimizer)(trained, blueprint.optimizer)
        self.optimizer.param_groups[0]["params"] = self.flat_weights()
        if config.offload_optimizer == "nvme":
            self.optimizer.disk = self.disk

    @classmethod
    def prepare(cls, blueprint: Blueprint) -> ShardUnit:
        """See Engine.prepare. Stage 3 shards units; the other stages leave them whole."""
        if blueprint.layout.config.zero_stage < 3:
            return super().prepare(blueprint)
        from parallel.engine.zero3 import start_sharding  # DeepSpeed takes seconds to import -> only stage 3 pays

        return start_sharding(blueprint)

    def _stage_names(self) -> list[list[str]]:
        """Return the names of the units of this rank's stages, and of the ballast."""
        stages = [list(self.blueprint.stages[stage].units) for stage in self.blueprint.local_stages]
        units = {name for names in stages for name in names}
        return [*stages, [name for name, _ in self.model.named_children() if name not in units]]

    def _stage_buckets(self, names: Sequence[str]) -> list[Bucket]:
        units = [[p for p in self.model.get_submodule(name).parameters() if p.requires_grad] for name in names]
        return make_buckets(units, self.layout.data_parallel_size, self.layout.data_parallel_rank)

    def _copy_weights(self, bucket: Bucket) -> None:
        """Make the fp32 weights of a bucket; where it is not divided, lay its parameters into one flat tensor."""
        config, device = self.layout.config, self.layout.device
        bucket.weights = torch.zeros(bucket.shard_size, device=device)
        for p, (first, count, start) in zip(bucket.parameters, bucket.pieces(), strict=True):
            held: Any = p
            values = held.ds_tensor[:count] if bucket.divided else p.detach().flatten()[first : first + count]
            bucket.weights[start : start + count] = values
        if config.offload_optimizer == "nvme":
            bucket.weights = self.disk.copy(bucket.weights)
        elif config.offload_optimizer == "cpu" and device.type != "cpu":
            bucket.weights = bucket.weights.cpu().pin_memory()
        bucket.weights.grad_dtype = None
        if bucket.divided:
            return
        first_parameter = bucket.parameters[0]
        bucket.flat = torch.zeros(bucket.numel, dtype=first_parameter.dtype, device=device)
        for number, p in enumerate(bucket.parameters):
            bucket.fill(bucket.flat, number, p.detach(), add=False)
            p.data = bucket.whole(bucket.flat, number).view(p.shape)

    def _start_gathers(self) -> Any:
        """Map sharded parameters into files if they are offloaded to "nvme", and hook their gathers to the units."""
        from parallel.engine.gathers import UnitGathers, sharded_parameters
        from parallel.engine.zero3 import quantized_sums

        config, stages = self.layout.config, self.blueprint.stages
        if config.offload_parameters == "nvme":
            for p in sharded_parameters(self.model):
                p.ds_tensor.data = self.disk.copy(p.ds_tensor.data)
        has_last = len(stages) - 1 in self.blueprint.local_stages
        names = [stages[stage].units for stage in self.blueprint.local_stages]
        self.gathers = UnitGathers(self.model, names, self._with_backward(), has_last, config.quantized_weights)
        return quantized_sums(self.layout) if config.quantized_gradients else None

    def _with_backward(self) -> set[str]:
        """Return the names of the units that a backward pass reaches: the first trained one and all after it."""
        names = [name for name, _ in self.blueprint.plan.units()]
        trained = [any(p.requires_grad for p in unit.parameters()) for _, unit in self.blueprint.plan.units()]
        return set(names[trained.index(True) :])

    def shards(self) -> list[Shard]:
        """See Engine.shards."""
        found = {id(p): (bucket, piece) for bucket in self.buckets for p, piece in bucket.placed()}
        shards = {id(bucket): Shard(bucket.weights, []) for bucket in self.buckets}
        for p, part in parameter_parts(self.model):
            if p.requires_grad:
                bucket, (first, count, start) = found[id(p)]
                shards[id(bucket)].rectangles += self._rectangles(p, part, first, count, start)
        return list(shards.values())

    def frozen_rectangles(self) -> list[tuple[Rectangle, Tensor]]:
        """See Engine.frozen_rectangles."""
        found = []
        for p, part in parameter_parts(self.model):
            if p.requires_grad:
                continue
            local: Any = p
            divided = is_divided(p)
            values = local.ds_tensor if divided else p.detach().flatten()
            first = self.layout.data_parallel_rank * values.numel() if divided else 0
            found += [(r, r.view(values)) for r in self._rectangles(p, part, first, values.numel(), 0)]
        return found

    def _rectangles(self, parameter: nn.Parameter, part: Any, first: int, count: int, start: int) -> list[Rectangle]:
        return rectangles([part], first, count, start, is_counted(parameter, self.layout.tensor_parallel_rank))

    def publish(self) -> None:
        """See Engine.publish."""
        self._publish()
        if self.gathers is not None:  # second copies of frozen parameters too
            self.gathers.drop_second_copies()

    @torch.no_grad()
    def _publish(self) -> None:
        """Copy the fp32 weights into the sharded parameters, and send whole ones to all ranks."""
        works = []
        for bucket in self.buckets:
            if bucket.divided:
                bucket.publish_shards()
                continue
            own = bucket.weights.to(bucket.flat.device, bucket.flat.dtype)
            if bucket.ranks == 1:
                bucket.flat.copy_(own)
            else:
                works.append(
                    (dist.all_gather_into_tensor(bucket.flat, own, self.layout.data_group, async_op=True), own)
                )
        for work, _ in works:
            work.wait()

    def forward_backward(self, micro_batches: Sequence[MicroBatch], num_targets: int) -> LossTotals:
        """See Engine.forward_backward."""
        if self.gathers is not None and self.layout.config.gather == "step":
            self.gathers.keep()  # until the update
        return super().forward_backward(micro_batches, num_targets)

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> LossTotals:
        """See Engine.evaluate."""
        if self.gathers is None or self.layout.config.gather != "step":
            return super().evaluate(micro_batches)
        with self.gathers.holding():
            return super().evaluate(micro_batches)

    def generate(self, batch: MicroBatch, max_new_tokens: int, **search: Any) -> Tensor:
        """See Engine.generate. Stage 3 gathers the whole model for it."""
        if self.gathers is None:
            return super().generate(batch, max_new_tokens, **search)
        with self.gathers.holding():
            return super().generate(batch, max_new_tokens, **search)

    def score(self, batch: MicroBatch, targets: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """See Engine.score. Stage 3 gathers the whole model for it."""
        if self.gathers is None:
            return super().score(batch, targets)
        with self.gathers.holding():
            return super().score(batch, targets)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """See Engine.backward."""
        self.reducer.backward(loss, last)
        if self.gathers is not None:
            self.gathers.after_backward()

    def flat_weights(self) -> list[Tensor]:
        """See Engine.flat_weights."""
        return [bucket.weights for bucket in self.buckets]

    def sum_gradients(self) -> tuple[list[Tensor], Tensor]:
        """See Engine.sum_gradients."""
        self.reducer.finish()
        if self.gathers is not None:
            self.gathers.let_go()
        gradients = [bucket.take_gradient() for bucket in self.buckets]
        return gradients, self._squares(gradients)

    def publish_update(self) -> None:
        """See Engine.publish_update. Frozen parameters keep their second copies."""
        self._publish()
        if self.gathers is not None:
            self.gathers.drop_second_copies(trained=True)

    def _squares(self, gradients: Sequence[Tensor]) -> Tensor:
        squares = torch.zeros((), dtype=torch.float64, device=self.layout.device)
        for bucket, gradient in zip(self.buckets, gradients, strict=True):
            for counted in bucket.counted_ranges(self.layout.tensor_parallel_rank):
                squares += squared_norm(gradient[counted])
        if self.layout.world_size > 1:
            dist.all_reduce(squares)
        return squares
