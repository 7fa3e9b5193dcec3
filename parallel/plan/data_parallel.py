"""Predict what data-parallel ranks exchange in a step: parameters and gradients, and the seconds that no work hides."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any, NamedTuple

from parallel.config import ParallelConfig
from parallel.plan.buckets import REPLICATED_BUCKET, joined
from parallel.plan.collectives import Group, all_gather_s, all_reduce_s, reduce_scatter_s
from parallel.plan.gathered import num_kept
from parallel.plan.hardware import Hardware
from parallel.plan.overlap import UnitPass, exposed
from parallel.plan.unit_info import UnitInfo
from parallel.plan.unit_time import UnitTime

FP32, BF16 = 4, 2  # bytes
Stage = tuple[int, int, bool]  # first unit, end, whether it is the last of the model


class Messages(NamedTuple):
    """Seconds of a stage's messages by unit: gathers for its passes, and sums of the buckets that it completes."""

    gathers_forward: list[float]
    gathers_backward: list[float]
    sums: list[float]


@dataclass(frozen=True)
class DataParallel:
    """Predict the exchange of one layout; `times` are those of a micro-batch, for every unit of the model."""

    hardware: Hardware
    parallel: ParallelConfig
    group: Group
    element_bytes: int
    infos: Sequence[UnitInfo]
    times: Sequence[UnitTime]
    known: dict[Any, Messages] = field(default_factory=dict)
    """Messages that were computed before; layouts share them."""
    overlaps: bool = True
    """Whether sums of gradients run beside the last backward pass."""

    @property
    def summed_bytes(self) -> int:
        """Return the bytes of an element of gradients on their way."""
        return BF16 if self.parallel.reduce_dtype == "bf16" else FP32

    def sharded(self, info: UnitInfo) -> float:
        """Return the elements of a unit that ZeRO-3 shards; small ones, which it does not, count too."""
        return info.local(self.parallel) if self.parallel.shard_frozen else info.local_trained(self.parallel)

    def gathered(self, stage: Stage) -> tuple[list[float], list[float]]:
        """Return the elements that ZeRO-3 gathers for the forward and for the backward pass of every unit.

        It gathers a unit anew for its backward pass, but for the last units where that follows at once.
        """
        first, end, last = stage
        if self.parallel.zero_stage < 3 or self.parallel.gather == "step":
            return [0.0] * (end - first), [0.0] * (end - first)
        infos = self.infos[first:end]
        sizes = [self.sharded(info) for info in infos]
        own = [i for i, size in enumerate(sizes) if size]
        kept = num_kept([sizes[i] for i in own]) if last else 0
        again = {i for i in own[: len(own) - kept] if infos[i].trained or infos[i].below_trained}
        return sizes, [size if i in again else 0.0 for i, size in enumerate(sizes)]

    def buckets(self, stage: Stage) -> dict[int, float]:
        """Return the elements of each bucket of gradients, by the unit of the stage that completes it."""
        sizes = [info.local_trained(self.parallel) for info in self.infos[stage[0] : stage[1]]]
        return {units[-1]: sum(sizes[i] for i in units) for units in joined(sizes)}

    def messages(self, stage: Stage) -> Messages:
        """Return the seconds of the messages of a stage."""
        p = self.parallel
        key = (
            stage,
            self.group,
            self.element_bytes,
            p.tensor,
            p.replicate_frozen_vit,
            p.zero_stage,
            p.gather,
            p.shard_frozen,
            p.reduce_dtype,
        )
        if key not in self.known:
            sums = [0.0] * (stage[1] - stage[0])
            for i, size in self.buckets(stage).items():
                sums[i] = reduce_scatter_s(self.summed_bytes * size, self.group, self.hardware)
            forward, backward = ([self._gather_s(size) for size in sizes] for sizes in self.gathered(stage))
            self.known[key] = Messages(forward, backward, sums)
        return self.known[key]

    def least(self, stage: Stage, forward_s: float, backward_s: float) -> tuple[tuple[float, float], float]:
        """Return what `in_passes` returns at least, from the seconds of the work of both passes."""
        if self.is_silent:
            return (0.0, 0.0), 0.0
        forward, backward, sums = map(sum, self.messages(stage))
        reduce = sums if self.parallel.reduce == "micro_batch" else 0.0
        return (max(0.0, forward - forward_s), max(0.0, backward + reduce - backward_s)), 0.0

    @property
    def is_silent(self) -> bool:
        """Return whether nothing is exchanged beside the passes of every micro-batch."""
        p = self.parallel
        gathers = p.zero_stage == 3 and p.gather == "micro_batch"
        return self.group.size == 1 or p.zero_stage < 2 or not (gathers or p.reduce == "micro_batch")

    def in_passes(self, stage: Stage) -> tuple[tuple[float, float], float]:
        """Return the exposed seconds of every micro-batch: gathers (forward, backward) and sums of gradients."""
        if self.is_silent:
            return (0.0, 0.0), 0.0
        works = [time.forward.total_s for time in self.times[stage[0] : stage[1]]]
        forward, _ = exposed(list(map(UnitPass, works, self.messages(stage).gathers_forward)))
        backward, _ = exposed(self._backward(stage, sums=False))
        if self.parallel.reduce == "step":
            return (forward, backward), 0.0
        waited, after = exposed(self._backward(stage, sums=True))
        return (forward, backward), waited - backward + after

    def after_passes(self, stages: Sequence[Stage], least: bool = False) -> tuple[float, float]:
        """Return the exposed seconds of one rank besides its passes: gathering, sums of gradients.

        Once a step gradients are sent in the last backward pass of each stage, last stage first. `least`: as if all of
        them were hidden.
        """
        p = self.parallel
        if self.group.size == 1:
            return 0.0, 0.0
        infos = [info for first, end, _ in stages for info in self.infos[first:end]]
        trained = sum(info.local_trained(p) for info in infos)
        if p.zero_stage == 0:
            number = ceil(trained / REPLICATED_BUCKET)
            size = self.summed_bytes * trained / max(number, 1)
            return 0.0, number * all_reduce_s(size, self.group, self.hardware)
        gather = reduce = 0.0
        if p.reduce == "step" and not self.overlaps:
            reduce = sum(sum(self.messages(stage).sums) for stage in stages)
        elif p.reduce == "step" and not least:
            last = [each for stage in reversed(stages) for each in self._backward(stage, sums=True)]
            alone = [each for stage in reversed(stages) for each in self._backward(stage, sums=False)]
            waited, after = exposed(last)
            reduce = waited - exposed(alone)[0] + after
        if p.zero_stage < 3:
            gather = sum(self._gather_s(size) for stage in stages for size in self.buckets(stage).values())
        elif p.gather == "step":
            gather = sum(map(self._gather_s, map(self.sharded, infos)))
        return gather, reduce

    def _backward(self, stage: Stage, sums: bool) -> list[UnitPass]:
        """Return the backward pass of a stage, last unit first; `sums`: gradients are sent in it."""
        works = [time.backward.total_s for time in self.times[stage[0] : stage[1]]]
        _, gathers, reduces = self.messages(stage)
        return list(map(UnitPass, works, gathers, reduces if sums else [0.0] * len(works)))[::-1]

    def _gather_s(self, elements: float) -> float:
        return all_gather_s(self.element_bytes * elements, self.group, self.hardware) if elements else 0.0
