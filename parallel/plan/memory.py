"""How much memory of its device a rank needs: parameters and what belongs to them, activations of what is in flight.

Predicted, before anything is built. Not counted is what lives for a moment: ZeRO-3's gathered units, gradients before
they are added up, buffers of collectives, what a unit frees before it returns. Tensor parallelism is taken to divide
everything, as it does with sequence parallelism (Korthikanti et al. 2022); without it a block's norms stay whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from model.costs import BatchShape, UnitCost
from model.layers import parameter_parts
from parallel.config import OptimizerConfig, ParallelConfig

FP32 = 4  # bytes


@dataclass(frozen=True)
class Work:
    """What a rank does in a step: `num_micro_batches` of a `shape`."""

    shape: BatchShape
    num_micro_batches: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank of a layout, for an optimizer and the work of a step."""

    parallel: ParallelConfig
    optimizer: OptimizerConfig
    work: Work
    data_parallel_size: int

    def rank_bytes(self, stages: Sequence[Sequence[UnitCost]], rank: int) -> float:
        """Of the rank of a pipeline that holds these stages, first to last."""
        stored = sum(self.stored(unit) for stage in stages for unit in stage)
        return stored + self.kept([sum(map(self.kept_once, stage)) for stage in stages], rank)

    def stored(self, unit: UnitCost) -> float:
        """Parameters, gradients, optimizer state (Rajbhandari et al. 2020, "ZeRO", section 3).

        Weights as they are computed with; of trained ones an fp32 gradient, AdamW's two moments (Adafactor's take next
        to nothing, its momentum 2 bytes), and an fp32 copy unless they are fp32 themselves and ZeRO does not shard
        them. ZeRO shards copy and moments from stage 1 on, gradients from 2, weights from 3. What is offloaded takes
        nothing here.
        """
        parameters = [(part.shape.numel(), p.requires_grad) for p, part in parameter_parts(unit.unit)]
        trained = sum(number for number, is_trained in parameters if is_trained)
        total = sum(number for number, _ in parameters)
        return (total * self._weight_bytes() + trained * self._update_bytes()) / self.parallel.tensor

    def _weight_bytes(self) -> float:
        config, each = self.parallel, self.work.shape.element_bytes
        found = 0.0 if config.offload_parameters != "none" else each * self._share(from_stage=3)
        if config.hpz_partition_size > 1:
            found += each / config.hpz_partition_size
        return found + (each if config.gather == "step" else 0.0)

    def _update_bytes(self) -> float:
        config = self.parallel
        if config.offload_optimizer != "none":
            return 0.0
        moments = 2 * FP32 if self.optimizer.name == "adamw" else 2 * bool(self.optimizer.momentum)
        copy = FP32 if config.zero_stage or self.work.shape.element_bytes < FP32 else 0
        return FP32 * self._share(from_stage=2) + (copy + moments) * self._share(from_stage=1)

    def _share(self, from_stage: int) -> float:
        return 1 / self.data_parallel_size if self.parallel.zero_stage >= from_stage else 1.0

    def kept_once(self, unit: UnitCost) -> float:
        """Activations of one micro-batch."""
        return unit.kept_bytes / self.parallel.tensor

    def kept(self, stages: Sequence[float], rank: int) -> float:
        """The most that a rank keeps at once, from what one micro-batch leaves in each of its stages.

        A schedule begins with some forward passes and goes on with one backward pass for each forward: GPipe begins
        with all (Huang et al. 2019), 1F1B on rank r of p with p - r, interleaved 1F1B with v stages a rank with
        (v - 1) p + 2 (p - r - 1) + 1, dealt to them p micro-batches at a time, last stages first backwards (Narayanan
        et al. 2021, "Efficient Large-Scale Language Model Training", section 2.2).
        """
        p, v, number = self.parallel.pipeline, len(stages), self.work.num_micro_batches
        if v > 1:
            number = -(-number // p) * p  # filled up with empty ones
        passes = number * v
        ahead = (v - 1) * p + (2 if v > 1 else 1) * (p - rank - 1) + 1
        if v == 1 and p > 1 and (self.parallel.schedule == "gpipe" or number < p):
            ahead = passes
        forward = list(accumulate(stages[i // p % v] for i in range(passes)))
        backward = accumulate((stages[v - 1 - i // p % v] for i in range(passes)), initial=0.0)
        return max(kept - freed for kept, freed in zip(forward[min(ahead, passes) - 1 :], backward, strict=False))

    def in_flight(self, stage: int) -> int:
        """Micro-batches of which a stage, of all that there are, keeps activations at once, at most."""
        own, rank = divmod(stage, self.parallel.pipeline)
        return round(self.kept([float(i == own) for i in range(self.parallel.virtual_stages)], rank))
