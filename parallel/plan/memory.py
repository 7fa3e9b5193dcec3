"""Predict the memory that a rank needs: parameters, gradients, optimizer state and activations in flight.

The prediction needs no process group and no built model. It leaves out what lives for a moment: ZeRO-3's gathered
units, gradients before they are added up, buffers of collectives, memory that a unit frees before it returns. Tensor
parallelism is taken to divide everything, as it does with sequence parallelism (Korthikanti et al. 2022). Without
sequence parallelism, a block's norms stay whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from model.config import PaLIConfig
from model.costs import BatchShape, Unit, UnitCost
from model.layers import parameter_parts
from model.mt5 import DecoderBlock
from model.tensor_parallel import num_shared
from model.vit import VIT_UNITS
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.optimizer.base import optimizer_class

FP32 = 4  # bytes
TEXT_TOKENS = 32  # input and target text of an example of the paper's tables


@dataclass(frozen=True)
class StepShape:
    """Describe a rank's step: the shape of one micro-batch, and their number."""

    micro_batch: BatchShape
    num_micro_batches: int

    @classmethod
    def from_one_example(cls, config: PaLIConfig, parallel: ParallelConfig, dtype: torch.dtype) -> "StepShape":
        """Take rows of one image and its text each, and as many micro-batches as fill the pipeline."""
        rows, vision = parallel.micro_batch_size, config.tokens_per_image
        shape = BatchShape(rows, vision, rows, vision + TEXT_TOKENS, TEXT_TOKENS, dtype.itemsize)
        return cls(shape, parallel.pipeline * parallel.virtual_stages)


def alone(parallel: ParallelConfig) -> ParallelConfig:
    """Return the layout as a ViT that each tensor-parallel rank holds whole sees it: one such rank."""
    return replace(parallel, tensor=1, sequence=False, replicate_frozen_vit=False)


def with_own_images(shape: BatchShape, parallel: ParallelConfig) -> BatchShape:
    """Return a micro-batch with a tensor-parallel rank's share of the images."""
    return replace(shape, images=num_shared(shape.images, parallel.tensor))


@dataclass(frozen=True)
class MemoryModel:
    """Predict bytes on one rank of a layout, for an optimizer and the shape of a step."""

    parallel: ParallelConfig
    optimizer: OptimizerConfig
    step: StepShape
    data_parallel_size: int

    def rank_bytes(self, stages: Sequence[Sequence[UnitCost]], rank: int) -> float:
        """Return the bytes of pipeline rank `rank`, which holds these stages, first to last."""
        stored = sum(self.stored(unit) for stage in stages for unit in stage)
        kept = [sum(map(self.kept_once, stage)) + self.encoder_bytes(stage) for stage in stages]
        return stored + self.kept(kept, rank)

    def stored(self, unit: UnitCost) -> float:
        """Count parameters, gradients and optimizer state (Rajbhandari et al. 2020, "ZeRO", section 3).

        Every weight takes the bytes of the compute dtype. A trained one also takes an fp32 gradient, AdamW's two
        moments (Adafactor's take next to nothing, its momentum 2 bytes), and an fp32 copy, unless it is fp32 itself and
        ZeRO does not shard it. ZeRO shards copy and moments from stage 1 on, weights in stage 3, frozen ones only if
        `shard_frozen` is set. Offloaded tensors take nothing.
        """
        parameters = [(part.shape.numel(), p.requires_grad) for p, part in parameter_parts(unit.unit)]
        trained = sum(number for number, is_trained in parameters if is_trained)
        return self.stored_bytes(sum(number for number, _ in parameters), trained) / self.tensor_ranks(unit.unit)

    def tensor_ranks(self, unit: Unit) -> int:
        """Return the ranks that a unit's tensors are divided over: 1 where each holds the ViT whole."""
        return 1 if self.parallel.replicate_frozen_vit and isinstance(unit, VIT_UNITS) else self.parallel.tensor

    def for_unit(self, unit: Unit) -> "MemoryModel":
        """Return the model of a unit by itself: one rank with its share of the images, where each has the ViT whole."""
        if self.tensor_ranks(unit) == self.parallel.tensor:
            return self
        return replace(
            self,
            parallel=alone(self.parallel),
            step=replace(self.step, micro_batch=with_own_images(self.step.micro_batch, self.parallel)),
        )

    def stored_bytes(self, total: float, trained: float) -> float:
        """Return the bytes of `total` elements; `trained` of them are trained."""
        weights = trained * self.weight_bytes(True) + (total - trained) * self.weight_bytes(False)
        return weights + trained * self.update_bytes()

    def is_sharded(self, trained: bool) -> bool:
        """Return whether ZeRO-3 shards such parameters; smaller ones than its threshold are left out."""
        return self.parallel.zero_stage == 3 and (trained or self.parallel.shard_frozen)

    def weight_bytes(self, trained: bool) -> float:
        """Return the bytes of a parameter in the compute dtype."""
        config, each = self.parallel, self.step.micro_batch.element_bytes
        if not self.is_sharded(trained):
            return each
        found = 0.0 if config.offload_parameters != "none" else each / self.data_parallel_size
        if config.hpz_partition_size > 1:
            found += each / config.hpz_partition_size
        return found + (each if config.gather == "step" else 0.0)

    def update_bytes(self) -> float:
        """Return the bytes of a trained parameter's gradient, fp32 copy and optimizer state.

        ZeRO keeps a whole fp32 gradient only to add up micro-batches that are not summed over ranks one by one.
        """
        config = self.parallel
        gradient = float(FP32 if config.zero_stage == 0 or self.adds_up_whole else 0)
        if config.offload_optimizer != "none":
            return gradient
        if config.zero_stage and (self.data_parallel_size > 1 or not gradient):
            gradient += FP32 / self.data_parallel_size
        moments = optimizer_class(self.optimizer).bytes_per_element(self.optimizer)
        moments += FP32 if self.optimizer.average_decay else 0
        copy = FP32 if config.zero_stage or self.step.micro_batch.element_bytes < FP32 else 0
        return gradient + (copy + moments) / (self.data_parallel_size if config.zero_stage else 1)

    @property
    def adds_up_whole(self) -> bool:
        """Return whether ZeRO adds up whole gradients of several micro-batches, and sums over ranks once a step."""
        return self.parallel.zero_stage > 0 and self.parallel.reduce == "step" and self.step.num_micro_batches > 1

    def kept_once(self, unit: UnitCost) -> float:
        """Return the bytes of activations that one micro-batch keeps for its backward pass."""
        return unit.kept_bytes / self.parallel.tensor

    def encoder_bytes(self, units: Sequence[UnitCost]) -> float:
        """Return the bytes of the encoder's output, which decoder blocks of a stage share whole as one tensor."""
        block = next((each.unit for each in units if isinstance(each.unit, DecoderBlock) and each.kept_bytes), None)
        if block is None or not self.parallel.sequence:
            return 0.0
        shape = self.step.micro_batch
        return float(shape.element_bytes * shape.rows * shape.encoder_tokens * block.mt5.d_model)

    def kept(self, stages: Sequence[float], rank: int) -> float:
        """Return the most that a rank keeps at once; `stages`: what one micro-batch keeps in each of its stages.

        A schedule begins with some forward passes, then alternates one forward and one backward pass. GPipe begins with
        all forward passes (Huang et al. 2019), 1F1B on rank r of p with p - r. Interleaved 1F1B with v stages a rank
        begins with (v - 1) p + 2 (p - r - 1) + 1: p micro-batches at a time run through each stage in turn, and
        backward passes take the last stage first (Narayanan et al. 2021, "Efficient Large-Scale Language Model
        Training", section 2.2).
        """
        p, v, number = self.parallel.pipeline, len(stages), self.step.num_micro_batches
        if v > 1:
            number = -(-number // p) * p  # the schedule takes multiples of p -> empty micro-batches fill up
        passes = number * v
        ahead = (v - 1) * p + (2 if v > 1 else 1) * (p - rank - 1) + 1
        if v == 1 and p > 1 and (self.parallel.schedule == "gpipe" or number < p):
            ahead = passes
        forward = list(accumulate(stages[i // p % v] for i in range(passes)))
        backward = accumulate((stages[v - 1 - i // p % v] for i in range(passes)), initial=0.0)
        return max(kept - freed for kept, freed in zip(forward[min(ahead, passes) - 1 :], backward, strict=False))

    def in_flight(self, stage: int) -> int:
        """Return the most micro-batches whose activations stage number `stage` keeps at once."""
        own, rank = divmod(stage, self.parallel.pipeline)
        return round(self.kept([float(i == own) for i in range(self.parallel.virtual_stages)], rank))
