"""Predict the seconds of one layout's training step by cause, from units, collectives and a played schedule."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

from model.costs import Unit, UnitCost
from model.layers import parameter_parts
from model.mt5 import Bridge, DecoderBlock, EncoderBlock, EncoderNorm, Head
from model.vit import VIT_UNITS
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.plan.actions import Pipeline
from parallel.plan.collectives import Group, Placement, all_gather_s, all_reduce_s, message_s, reduce_scatter_s
from parallel.plan.gathered import num_kept
from parallel.plan.hardware import Hardware
from parallel.plan.memory import StepShape
from parallel.plan.play import StageTime, Timeline, play, step_s
from parallel.plan.unit_time import Pass, UnitClock, UnitTime

FP32, BF16 = 4, 2  # bytes
# Bytes that an update moves for each element: fp32 gradients, weights and state, read and written in several passes.
UPDATE_BYTES = {"adafactor": 36, "adamw": 32}
UPDATE_LAUNCHES = {"adafactor": 14, "adamw": 1}  # kernels for each parameter
STACKS = ("vit", "bridge", "encoder", "decoder", "head", "classifier")


@dataclass(frozen=True)
class UnitInfo:
    """Hold what a plan needs of a unit besides its cost: whole sizes of its parameters."""

    name: str
    elements: int
    trained_elements: int
    trained: bool
    below_trained: bool
    parameters: int

    @property
    def stack(self) -> str:
        """Return the stack of `STACKS` that the unit belongs to."""
        first = self.name.partition("_")[0]
        return {"patches": "vit"}.get(first, first)


def unit_infos(units: Iterable[tuple[str, Unit]]) -> list[UnitInfo]:
    """Count the parameters of units, in their order."""
    found, below = [], False
    for name, unit in units:
        parts = [(part.shape.numel(), p.requires_grad) for p, part in parameter_parts(unit)]
        trained = sum(number for number, is_trained in parts if is_trained)
        found.append(UnitInfo(name, sum(number for number, _ in parts), trained, trained > 0, below, len(parts)))
        below |= trained > 0
    return found


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of the slowest rank, by cause; they add up to `seconds`."""

    compute_s: dict[str, float]
    """Forward and backward passes of the busiest rank, by stack."""
    recompute_s: float
    """Forward passes repeated in the backward pass, part of `compute_s`."""
    bubble_s: float
    """Waiting for other pipeline stages, messages included."""
    tensor_s: float
    """Tensor-parallel collectives that no work hides."""
    gather_s: float
    """ZeRO's gathering of parameters."""
    reduce_s: float
    """Sums of gradients over replicas."""
    update_s: float
    """The optimizer."""
    host_s: float
    """Work of the host that no device work hides."""

    @property
    def seconds(self) -> float:
        """Return the seconds of a step."""
        parts = (self.bubble_s, self.tensor_s, self.gather_s, self.reduce_s, self.update_s, self.host_s)
        return sum(self.compute_s.values()) + sum(parts)

    def parts(self) -> dict[str, float]:
        """Return the seconds by cause, in the words of tables; compute by stack, without what is recomputed."""
        whole = sum(self.compute_s.values())
        share = 1 - self.recompute_s / whole if whole else 1.0
        return {
            **{f"compute {stack}": share * seconds for stack, seconds in self.compute_s.items()},
            "recomputation": self.recompute_s,
            "bubble": self.bubble_s,
            "tensor-parallel messages": self.tensor_s,
            "gathering parameters": self.gather_s,
            "summing gradients": self.reduce_s,
            "update": self.update_s,
            "host": self.host_s,
        }

    @property
    def communication_s(self) -> float:
        """Return the seconds of exposed communication, pipeline messages left out."""
        return self.tensor_s + self.gather_s + self.reduce_s


@dataclass(frozen=True)
class StepModel:
    """Predict steps of one model under one layout; `costs` are marked for its recomputation."""

    hardware: Hardware
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    step: StepShape
    data_parallel_size: int
    costs: Sequence[UnitCost]
    infos: Sequence[UnitInfo]
    fused: bool
    times: dict[tuple[object, ...], list[UnitTime]] = field(default_factory=dict)
    cuts: dict[tuple[object, ...], list[int]] = field(default_factory=dict)

    @cached_property
    def placement(self) -> Placement:
        """Return where the process groups lie."""
        p = self.parallel
        return Placement.from_degrees(p.tensor, self.data_parallel_size, p.pipeline, self.hardware.devices_per_node)

    @cached_property
    def unit_times(self) -> list[UnitTime]:
        """Return the seconds of every unit for a micro-batch; models that share `times` compute them once."""
        if self._key not in self.times:
            clock = self._clock
            known: dict[tuple[object, ...], UnitTime] = {}
            found = []
            for cost, info in zip(self.costs, self.infos, strict=True):
                kind = (type(cost.unit), cost.unit.recompute, info.trained, info.below_trained)
                if kind not in known:
                    known[kind] = clock.for_unit(cost.unit).time(cost.unit, info.trained, info.below_trained)
                found.append(known[kind])
            self.times[self._key] = found
        return self.times[self._key]

    @property
    def _clock(self) -> UnitClock:
        return UnitClock(self.hardware, self.parallel, self.placement.tensor, self.step.micro_batch, self.fused)

    def _encoder_output(self, first: int, end: int) -> UnitTime:
        """Return the messages of the encoder's output, which the decoder blocks of a stage share."""
        for cost, info in zip(self.costs[first:end], self.infos[first:end], strict=True):
            if isinstance(cost.unit, DecoderBlock):
                return self._clock.encoder_output(cost.unit.mt5.d_model, info.below_trained)
        return UnitTime(Pass(), Pass())

    @property
    def _key(self) -> tuple[object, ...]:
        """Return all that the times of the units of one model depend on, besides the hardware."""
        p = self.parallel
        return (p.tensor, p.sequence, p.replicate_frozen_vit, self.step.micro_batch, p.recompute)

    @property
    def pipeline(self) -> Pipeline:
        """Return the size of the schedule."""
        p = self.parallel
        return Pipeline(p.pipeline, p.virtual_stages, self.step.num_micro_batches, p.schedule)

    def starts(self) -> list[int]:
        """Return the first unit of each stage so that the slowest stage is as fast as possible."""
        number = self.parallel.pipeline * self.parallel.virtual_stages
        key = (number, *self._key)
        if key not in self.cuts:
            self.cuts[key] = balanced([time.total_s for time in self.unit_times], number)
        return self.cuts[key]

    def stage_times(self, starts: Sequence[int]) -> list[StageTime]:
        """Return what the played schedule needs of each stage."""
        found = []
        ends = [*starts[1:], len(self.costs)]
        for index, (first, end) in enumerate(zip(starts, ends, strict=True)):
            times = [*self.unit_times[first:end], self._encoder_output(first, end)]
            gather, reduce = self._passes(first, end, last=index == len(starts) - 1)
            found.append(
                StageTime(
                    sum(time.forward.total_s for time in times) + gather[0],
                    sum(time.backward.total_s for time in times) + gather[1] + reduce,
                    self._message_s(first - 1, gradient=False) if index else 0.0,
                    self._message_s(end - 1, gradient=True) if end < len(self.costs) else 0.0,
                )
            )
        return found

    def _passes(self, first: int, end: int, last: bool) -> tuple[tuple[float, float], float]:
        """Return ZeRO's seconds in every micro-batch: gathers (forward, backward) and sums of gradients.

        Stage 3 gathers a unit anew for its backward pass, but for the last units where that follows at once.
        """
        p, infos = self.parallel, self.infos[first:end]
        group, t = self.placement.data, p.tensor
        if p.zero_stage < 2 or group.size == 1:
            return (0.0, 0.0), 0.0
        trained = [self._summed_bytes * info.trained_elements / t for info in infos if info.trained]
        reduce = self._sum(reduce_scatter_s, trained) if p.reduce == "micro_batch" else 0.0
        if p.zero_stage == 2 or p.gather == "step":
            return (0.0, 0.0), reduce
        element = self.step.micro_batch.element_bytes
        sharded = [(self._sharded(info) / t, info) for info in infos if self._sharded(info)]
        kept = num_kept([size for size, _ in sharded]) if last else 0
        again = [size for size, info in sharded[: len(sharded) - kept] if info.trained or info.below_trained]
        forward, backward = ([element * size for size in sizes] for sizes in ([size for size, _ in sharded], again))
        return (self._sum(all_gather_s, forward), self._sum(all_gather_s, backward)), reduce

    def _sharded(self, info: UnitInfo) -> int:
        """Return the elements of a unit that ZeRO-3 shards; small ones, which it does not, count too.

        Those of a ViT that each tensor-parallel rank holds whole count once for each of them.
        """
        p = self.parallel
        copies = p.tensor if p.replicate_frozen_vit and info.stack == "vit" else 1
        return copies * info.elements if p.shard_frozen else info.trained_elements

    def _sum(self, seconds: Callable[[float, Group, Hardware], float], sizes: Sequence[float]) -> float:
        """Return the seconds of a data-parallel collective for each of these bytes; most units are equal."""
        counts = Counter(sizes)
        return sum(number * seconds(size, self.placement.data, self.hardware) for size, number in counts.items())

    @property
    def _summed_bytes(self) -> int:
        """Return the bytes of an element of gradients that data-parallel ranks sum."""
        return BF16 if self.parallel.reduce_dtype == "bf16" else FP32

    def _message_s(self, after: int, gradient: bool) -> float:
        """Return the seconds of the carry after a unit, or of its gradient."""
        shape, p = self.step.micro_batch, self.parallel
        unit: Any = self.costs[after].unit
        if gradient and not (self.infos[after].trained or self.infos[after].below_trained):
            return 0.0
        if isinstance(unit, (Bridge, EncoderBlock, EncoderNorm, DecoderBlock, Head)):
            d = unit.mt5.d_model
            elements: float = shape.rows * (shape.encoder_tokens + shape.decoder_tokens) * d
        else:
            elements = shape.images * shape.vision_tokens * unit.config.width
        divided = p.sequence or (p.replicate_frozen_vit and isinstance(unit, VIT_UNITS))
        size = shape.element_bytes * elements / (p.tensor if divided else 1)
        return message_s(size, self.placement.pipeline, self.hardware)

    def after_passes(self, starts: Sequence[int]) -> tuple[float, float, float]:
        """Return the slowest rank's seconds after the passes: gathering, sum of gradients, update."""
        found = [(0.0, 0.0, 0.0)]
        ends = [*starts[1:], len(self.costs)]
        p, group = self.parallel, self.placement.data
        for rank in range(p.pipeline):
            own = [i for s in range(rank, len(starts), p.pipeline) for i in range(starts[s], ends[s])]
            infos = [self.infos[i] for i in own]
            trained = sum(info.trained_elements for info in infos) / p.tensor
            sharded = sum(self._sharded(info) for info in infos) / p.tensor
            element = self.step.micro_batch.element_bytes
            gather = reduce = 0.0
            if p.zero_stage == 0:
                reduce = all_reduce_s(self._summed_bytes * trained, group, self.hardware)
            elif p.reduce == "step":
                reduce = reduce_scatter_s(self._summed_bytes * trained, group, self.hardware)
            if p.zero_stage in (1, 2):
                gather = all_gather_s(element * trained, group, self.hardware)
            elif p.zero_stage == 3 and p.gather == "step":
                gather = all_gather_s(element * sharded, group, self.hardware)
            share = self.data_parallel_size if p.zero_stage else 1
            launches = UPDATE_LAUNCHES[self.optimizer.name] * sum(info.parameters for info in infos if info.trained)
            moved = UPDATE_BYTES[self.optimizer.name] * trained / share
            update = self.hardware.elementwise_s(moved, launches)
            if self.optimizer.name == "adafactor":
                update += 2 * all_reduce_s(FP32 * 1e4 * len(infos), self.placement.stage, self.hardware)
            found.append((gather, reduce, update))
        return max(found, key=sum)

    def lower_bound_s(self, starts: Sequence[int]) -> float:
        """Return seconds that no schedule of this cut can beat.

        A rank computes all of its passes, after the first micro-batch has come through the stages before its first one,
        and before the last one's gradients have gone back through them.
        """
        stages, p = self.stage_times(starts), self.parallel.pipeline
        number, before, most = self.pipeline.run_micro_batches, 0.0, 0.0
        for rank in range(p):
            most = max(most, before + number * sum(stage.total_s for stage in stages[rank::p]))
            before += stages[rank].total_s + stages[rank].gradients_s
            before += stages[rank + 1].activations_s if rank + 1 < p else 0.0
        return most + sum(self.after_passes(starts)) + self.hardware.host_ms / 1e3

    def time(self, starts: Sequence[int]) -> StepTime:
        """Play the schedule of a cut and return the seconds of a step by cause."""
        stages, p, number = self.stage_times(starts), self.parallel.pipeline, self.pipeline.run_micro_batches
        passes = step_s(self.pipeline, stages)
        busiest = max(range(p), key=lambda rank: sum(stage.total_s for stage in stages[rank::p]))
        ends = [*starts[1:], len(self.costs)]
        own = [(starts[s], ends[s], s == len(starts) - 1) for s in range(busiest, len(starts), p)]
        compute = dict.fromkeys(STACKS, 0.0)
        tensor = gather = reduce = recompute = 0.0
        for first, end, last in own:
            for info, cost, time in zip(
                self.infos[first:end], self.costs[first:end], self.unit_times[first:end], strict=True
            ):
                compute[info.stack] += number * (time.forward.compute_s + time.backward.compute_s)
                tensor += number * (time.forward.tensor_s + time.backward.tensor_s)
                recompute += number * time.forward.compute_s * (cost.unit.recompute == "block" and info.trained)
            tensor += number * self._encoder_output(first, end).total_s
            gathers, reduced = self._passes(first, end, last)
            gather, reduce = gather + number * sum(gathers), reduce + number * reduced
        bubble = passes - sum(compute.values()) - tensor - gather - reduce
        after = self.after_passes(starts)
        return StepTime(
            compute, recompute, max(0.0, bubble), tensor, gather + after[0], reduce + after[1], after[2],
            self.hardware.host_ms / 1e3,
        )  # fmt: skip

    def timeline(self, starts: Sequence[int], micro_batches: int = 0) -> Timeline:
        """Play a schedule (of fewer micro-batches, for a figure) and return its timeline."""
        p = self.pipeline
        return play(
            Pipeline(p.ranks, p.virtual_stages, micro_batches or p.micro_batches, p.schedule), self.stage_times(starts)
        )


def balanced(seconds: Sequence[float], number: int) -> list[int]:
    """Return where `number` consecutive parts start so that the longest is as short as possible; none is empty."""
    ends = [0.0, *accumulate(seconds)]
    low, high = 0.0, ends[-1]
    best = list(range(number))
    while high - low > 1e-9 * ends[-1]:
        middle = (low + high) / 2
        starts = _fill(ends, number, middle)
        if starts is None:
            low = middle
        else:
            high, best = middle, starts
    return best


def _fill(ends: Sequence[float], number: int, limit: float) -> list[int] | None:
    """Fill parts up to `limit` from the front, leaving a unit for each part that follows; None if they do not do."""
    starts, units = [0], len(ends) - 1
    for part in range(1, number):
        end = min(bisect_right(ends, ends[starts[-1]] + limit) - 1, units - (number - part))
        if end <= starts[-1]:
            return None
        starts.append(end)
    return starts if ends[-1] - ends[starts[-1]] <= limit else None
