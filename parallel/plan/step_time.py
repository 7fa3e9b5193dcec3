"""Predict the seconds of one layout's training step by cause, from units, collectives and a played schedule."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

from model.costs import UnitCost
from model.mt5 import Bridge, DecoderBlock, EncoderBlock, EncoderNorm, Head
from model.vit import VIT_UNITS
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.plan.actions import Pipeline
from parallel.plan.collectives import Placement, all_reduce_s, message_s
from parallel.plan.data_parallel import DataParallel, Messages, Stage
from parallel.plan.hardware import Hardware
from parallel.plan.memory import StepShape
from parallel.plan.play import StageTime, Timeline, play, step_s
from parallel.plan.unit_info import UnitInfo
from parallel.plan.unit_time import Pass, UnitClock, UnitTime

FP32 = 4  # bytes
# Bytes that the kernels of an update read and write for each element, and kernels for each parameter: counted on `meta`
# for ranks of pali_3b and pali_17b, as tests/unit/parallel/optimizer/test_launches.py counts.
UPDATE_BYTES = {"adafactor": 100, "adamw": 72}
UPDATE_LAUNCHES = {"adafactor": 1, "adamw": 2}
OTHER_BYTES = 26  # the gradient's norm (12), clipping (8), and new weights in 16 bits (6)
STACKS = ("vit", "bridge", "encoder", "decoder", "head", "classifier")


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
    messages: dict[Any, Messages] = field(default_factory=dict)
    overlaps: bool = True
    """Whether sums of gradients run beside the last backward pass, as in our engine."""

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

    @cached_property
    def _outputs(self) -> dict[int, UnitTime]:
        """Return the messages of the encoder's output by decoder block: those of the first block of a stage count."""
        found: dict[int, UnitTime] = {}
        by_gradient: dict[bool, UnitTime] = {}
        for i, (cost, info) in enumerate(zip(self.costs, self.infos, strict=True)):
            if isinstance(cost.unit, DecoderBlock):
                if info.below_trained not in by_gradient:
                    by_gradient[info.below_trained] = self._clock.encoder_output(
                        cost.unit.mt5.d_model, info.below_trained
                    )
                found[i] = by_gradient[info.below_trained]
        return found

    def encoder_output(self, first: int, end: int) -> UnitTime:
        """Return the messages of the encoder's output, which the decoder blocks of a stage share."""
        block = next((i for i in self._outputs if i >= first), end)
        return self._outputs[block] if block < end else UnitTime(Pass(), Pass())

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

    def stage_times(self, starts: Sequence[int], least: bool = False) -> list[StageTime]:
        """Return what the played schedule needs of each stage; `least`: what it takes at least."""
        found = []
        for index, stage in enumerate(self.stages(starts)):
            first, end, _ = stage
            times = [*self.unit_times[first:end], self.encoder_output(first, end)]
            forward = sum(time.forward.total_s for time in times)
            backward = sum(time.backward.total_s for time in times)
            replicas = self.between_replicas
            gather, reduce = replicas.least(stage, forward, backward) if least else replicas.in_passes(stage)
            found.append(
                StageTime(
                    forward + gather[0],
                    backward + gather[1] + reduce,
                    self._message_s(first - 1, gradient=False) if index else 0.0,
                    self._message_s(end - 1, gradient=True) if end < len(self.costs) else 0.0,
                )
            )
        return found

    @cached_property
    def between_replicas(self) -> DataParallel:
        """Return the exchange between data-parallel ranks."""
        element = self.step.micro_batch.element_bytes
        return DataParallel(
            self.hardware, self.parallel, self.placement.data, element, self.infos, self.unit_times, self.messages,
            self.overlaps,
        )  # fmt: skip

    def stages(self, starts: Sequence[int]) -> list[Stage]:
        """Return the stages that start at these units."""
        ends = [*starts[1:], len(self.costs)]
        return [(first, end, end == len(self.costs)) for first, end in zip(starts, ends, strict=True)]

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

    def after_passes(self, starts: Sequence[int], least: bool = False) -> tuple[float, float, float]:
        """Return the slowest rank's seconds besides the passes: gathering, sum of gradients, update.

        `least`: as if work hid all sums of ZeRO.
        """
        stages, number = self.stages(starts), self.parallel.pipeline
        found = [(0.0, 0.0, 0.0)]
        for own in (stages[rank::number] for rank in range(number)):
            infos = [info for first, end, _ in own for info in self.infos[first:end]]
            found.append((*self.between_replicas.after_passes(own, least), self._update_s(infos)))
        return max(found, key=sum)

    def _update_s(self, infos: Sequence[UnitInfo]) -> float:
        """Return the seconds of an update of these units, its norm and the new weights included."""
        name, p = self.optimizer.name, self.parallel
        trained = sum(info.local_trained(p) for info in infos)
        share = self.data_parallel_size if p.zero_stage else 1
        launches = UPDATE_LAUNCHES[name] * sum(info.parameters for info in infos if info.trained)
        update = self.hardware.elementwise_s((UPDATE_BYTES[name] + OTHER_BYTES) * trained / share, launches)
        group = self.placement.stage if p.zero_stage else self.placement.tensor
        return update + sum(all_reduce_s(FP32 * number, group, self.hardware) for number in self.summed(infos))

    @staticmethod
    def summed(infos: Sequence[UnitInfo]) -> list[int]:
        """Return the fp32 numbers of each all-reduce of an update of these units."""
        return [sum(numbers) for numbers in zip(*(info.summed for info in infos if info.summed), strict=True)]

    def lower_bound_s(self, starts: Sequence[int]) -> float:
        """Return seconds that no schedule of this cut can beat.

        A rank computes all of its passes, after the first micro-batch has come through the stages before its first one,
        and before the last one's gradients have gone back through them.
        """
        stages, p = self.stage_times(starts, least=True), self.parallel.pipeline
        number, before, most = self.pipeline.run_micro_batches, 0.0, 0.0
        for rank in range(p):
            most = max(most, before + number * sum(stage.total_s for stage in stages[rank::p]))
            before += stages[rank].total_s + stages[rank].gradients_s
            before += stages[rank + 1].activations_s if rank + 1 < p else 0.0
        return most + sum(self.after_passes(starts, least=True)) + self.hardware.host_ms / 1e3

    def time(self, starts: Sequence[int]) -> StepTime:
        """Play the schedule of a cut and return the seconds of a step by cause."""
        stages, p, number = self.stage_times(starts), self.parallel.pipeline, self.pipeline.run_micro_batches
        passes = step_s(self.pipeline, stages)
        busiest = max(range(p), key=lambda rank: sum(stage.total_s for stage in stages[rank::p]))
        own = self.stages(starts)[busiest::p]
        compute = dict.fromkeys(STACKS, 0.0)
        tensor = gather = reduce = recompute = 0.0
        for first, end, last in own:
            for info, cost, time in zip(
                self.infos[first:end], self.costs[first:end], self.unit_times[first:end], strict=True
            ):
                compute[info.stack] += number * (time.forward.compute_s + time.backward.compute_s)
                tensor += number * (time.forward.tensor_s + time.backward.tensor_s)
                recompute += number * time.forward.compute_s * (cost.unit.recompute == "block" and info.trained)
            tensor += number * self.encoder_output(first, end).total_s
            gathers, reduced = self.between_replicas.in_passes((first, end, last))
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
