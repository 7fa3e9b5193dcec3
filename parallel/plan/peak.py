"""Predict the most memory that a rank holds at any moment of a step, term by term, over the played schedule.

`MemoryModel` counts what a rank stores, and what micro-batches in flight keep. This adds what lives for a moment:
gradients before they are added up, buckets of gradients, gathered parameters, temporary tensors of a pass, logits, and
the process's own overhead.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from model.costs import UnitCost
from model.mt5 import DecoderBlock, EncoderBlock
from parallel.plan.actions import BACKWARD, FORWARD, Pipeline
from parallel.plan.buckets import REPLICATED_BUCKET, Sending, held_in_backward
from parallel.plan.gathered import num_kept
from parallel.plan.hardware import GIB, Hardware
from parallel.plan.memory import FP32, MemoryModel
from parallel.plan.operators import Operators, operators
from parallel.plan.play import Moments, kept_counts
from parallel.plan.unit_info import UnitInfo


@dataclass(frozen=True)
class Peak:
    """Bytes of one rank at its fullest moment."""

    stored: float
    """Parameters, accumulated gradients, fp32 copies and the optimizer's state."""
    kept: float
    """Activations of micro-batches in flight."""
    passing: float
    """Temporary tensors and gradients of the pass that runs."""
    buffers: float
    """Buckets of gradients and gathered parameters."""
    overhead: float
    """The process itself: context, libraries, communicators."""
    moment: str
    """The pass, or the update, in which it happens."""

    @property
    def total(self) -> float:
        """Return all bytes."""
        return self.stored + self.kept + self.passing + self.buffers + self.overhead

    @property
    def tensors(self) -> float:
        """Return the bytes of tensors."""
        return self.total - self.overhead


@dataclass(frozen=True)
class PeakModel:
    """Predict the peak of ranks of a layout; `fused`: T5's attention is one kernel; `on_gpu`: as CUDA computes."""

    memory: MemoryModel
    hardware: Hardware
    costs: Sequence[UnitCost]
    infos: Sequence[UnitInfo]
    fused: bool = True
    on_gpu: bool = True
    counted: dict[tuple[Any, ...], float] = field(default_factory=dict)
    works: dict[type, Operators] = field(default_factory=dict)

    def peaks(self, starts: Sequence[int]) -> list[Peak]:
        """Return the peak of every pipeline rank, for stages that start at these units."""
        parallel, step = self.memory.parallel, self.memory.step
        number = step.num_micro_batches
        if parallel.schedule != "gpipe":  # keeps no more later on -> a few rounds show the most
            number = min(number, 4 * parallel.pipeline * parallel.virtual_stages)
        pipeline = Pipeline(parallel.pipeline, parallel.virtual_stages, number, parallel.schedule)
        ends = [*starts[1:], len(self.costs)]
        stages = list(zip(starts, ends, strict=True))
        return [self._rank(stages[r :: parallel.pipeline], own) for r, own in enumerate(kept_counts(pipeline))]

    def _rank(self, stages: list[tuple[int, int]], moments: Moments) -> Peak:
        memory = self.memory
        units = [i for first, end in stages for i in range(first, end)]
        infos = [self.infos[i] for i in units]
        parallel = memory.parallel
        stored = sum(memory.stored_bytes(info.local(parallel), info.local_trained(parallel)) for info in infos)
        stored += sum(info.state_bytes for info in infos)
        sums = self._sums(infos)
        kept = [sum(self._kept(i) for i in range(*s)) + memory.encoder_bytes(self.costs[slice(*s)]) for s in stages]
        overhead = self._overhead()
        extra = {f"{FORWARD} {s}": (self._in_forward(*stage),) * 2 for s, stage in enumerate(stages)}
        for s, stage in enumerate(stages):
            in_last = self._in_backward(*stage, last=True)
            differ = self._sending is not None and self._sums_once
            extra[f"{BACKWARD} {s}"] = self._in_backward(*stage, last=False) if differ else in_last, in_last
        found = [self._update(infos, stored, overhead)]
        ends = {name: number for number, (name, _) in enumerate(moments)}
        for (name, counts), last in dict.fromkeys((moment, ends[moment[0]] == n) for n, moment in enumerate(moments)):
            held = sum(number * size for number, size in zip(counts, kept, strict=True))
            found.append(Peak(stored - sums, held, *extra[name][last], overhead, name))
        return max(found, key=lambda peak: peak.total)

    @property
    def _element(self) -> int:
        return self.memory.step.micro_batch.element_bytes

    def _overhead(self) -> float:
        p, data = self.memory.parallel, self.memory.data_parallel_size
        divided = sum(size > 1 for size in (p.tensor, p.pipeline, data))
        # The world and the other sets of ranks that differ, and a pair of ranks for each neighbor in the pipeline.
        groups = (1, 1, 3, 6)[divided] + min(p.pipeline - 1, 2)
        return self.hardware.overhead_gib * GIB + groups * self.hardware.communicator_mib * 2**20

    def _local(self, elements: float) -> float:
        return elements / self.memory.parallel.tensor

    def _trained(self, info: UnitInfo) -> float:
        return info.local_trained(self.memory.parallel)

    def _sums(self, infos: Sequence[UnitInfo]) -> float:
        """Return the bytes of summed gradients, where none exist before a step's last backward pass."""
        sending = self._sending
        if sending is None or not (self._sums_once and sending.keeps_sums):
            return 0.0
        return FP32 * sum(map(self._trained, infos)) / sending.ranks

    @property
    def _sums_once(self) -> bool:
        return self.memory.adds_up_whole or self.memory.step.num_micro_batches == 1

    @property
    def _sending(self) -> Sending | None:
        """Return how ZeRO sends gradients; None where nothing is sent, or without ZeRO."""
        parallel, data = self.memory.parallel, self.memory.data_parallel_size
        if parallel.zero_stage == 0 or data == 1:
            return None
        narrow = parallel.reduce_dtype == "bf16"
        keeps_sums = parallel.offload_optimizer == "none"
        return Sending(data, 2 if narrow else FP32, self.memory.adds_up_whole, keeps_sums)

    def _buckets(self, first: int, end: int) -> tuple[list[float], float]:
        """Return the bytes of buckets at most in each unit's backward pass, and in a later forward pass."""
        sending = self._sending
        if sending is None:
            return [0.0] * (end - first), 0.0
        if not self._sums_once:
            sending = replace(sending, keeps_sums=False)  # stored already
        sizes = [self._trained(info) for info in self.infos[first:end]]
        found, after = held_in_backward(sizes, sending)
        return found, 0.0 if self._sums_once else after

    def _update(self, infos: Sequence[UnitInfo], stored: float, overhead: float) -> Peak:
        """Return the moment after the passes: nothing is kept, and sums of gradients or new weights take copies."""
        stage, data = self.memory.parallel.zero_stage, self.memory.data_parallel_size
        trained = sum(map(self._trained, infos))
        largest = max(map(self._trained, infos), default=0.0)
        narrow = self._element < FP32
        copies = self._element * trained if narrow and stage == 0 else 0.0
        if stage == 0 and data > 1:
            copies = max(copies, FP32 * min(trained, max(REPLICATED_BUCKET, largest)))
        elif stage in (1, 2) and narrow:
            copies = self._element * trained / data
        return Peak(stored, 0.0, copies, 0.0, overhead, "update")

    def _kept(self, i: int) -> float:
        return self._once(i, "kept", self._unit_kept)

    def _unit_kept(self, i: int) -> float:
        """Return what a unit keeps of a micro-batch; the head keeps its weights' gradient too.

        T5's norms compute in fp32: each keeps two fp32 tensors; under 16 bits its cost counts a quarter of them.
        """
        unit, head = self.costs[i].unit, self._work(i).vocabulary
        in_fp32 = isinstance(unit, (EncoderBlock, DecoderBlock)) and self._element < FP32 and self.infos[i].trained
        wide = (
            3 * self.costs[i].cost.norm_bytes
            if in_fp32 and unit.recompute not in ("block", "norm", "elementwise")
            else 0
        )
        gradient = self._element * self._local(head.size) * head.d_model if head and self.infos[i].trained else 0.0
        return self.memory.kept_once(self.costs[i]) + self._local(wide) + gradient

    def _gathered(self, first: int, end: int, step: int) -> list[float]:
        """Return the parameters that ZeRO-3 holds gathered in the pass of every unit: its own, and those that it keeps.

        The next unit, `step` further, is on its way. Of the model's last stage the last units stay gathered.
        """
        p, number = self.memory.parallel, end - first
        if p.zero_stage < 3 or p.gather == "step":
            return [0.0] * number
        local = [info.local(p) if p.shard_frozen else self._trained(info) for info in self.infos[first:end]]
        kept = number - num_kept(local) if end == len(self.infos) else number
        before = list(accumulate(local[kept:], initial=0.0))  # kept ones up to each unit
        found = []
        for i, own in enumerate(local):
            coming = local[i + step] if 0 <= i + step < number and not kept <= i + step <= i else 0.0
            found.append(self._element * (before[i - kept + 1] if i >= kept else own) + self._element * coming)
        return found

    def _in_forward(self, first: int, end: int) -> tuple[float, float]:
        """Return the most bytes of a forward pass beyond what is kept, and those of buckets on their way."""
        gathered = self._gathered(first, end, 1)
        passing = max(self._forward(i) + gathered[i - first] for i in range(first, end))
        return passing, self._buckets(first, end)[1]

    def _in_backward(self, first: int, end: int, last: bool) -> tuple[float, float]:
        """Return the most bytes of a backward pass beyond what is kept, and those of buckets at that moment.

        `last`: of the stage's passes in a step, in which gradients that are added up are sent.
        Units free what they kept, last one first. Without ZeRO, gradients of weights stay in 16 bits until the next
        pass begins; ZeRO moves each into its bucket as soon as it is complete.
        """
        stage, step = self.memory.parallel.zero_stage, self.memory.step
        trained = {i: self._trained(self.infos[i]) for i in range(first, end)}
        buckets = self._buckets(first, end)[0] if last or not self._sums_once else [0.0] * (end - first)
        gathered = self._gathered(first, end, -1)
        freed = grads = 0.0
        narrow = self._element < FP32
        most = (0.0, 0.0)
        if stage == 0 and narrow and step.num_micro_batches > 1:
            most = self._element * sum(trained.values()), 0.0
        for i in range(end - 1, first - 1, -1):
            info = self.infos[i]
            if not (info.trained or info.below_trained):
                continue
            is_head = self._work(i).vocabulary is not None
            if stage == 0 and narrow and not is_head:
                grads += self._element * trained[i]
            new = self._element * self._local(info.largest) if stage and not is_head else 0.0
            passing = self._backward(i) + grads + new + gathered[i - first] - freed
            most = max(most, (passing, buckets[i - first]), key=sum)
            if is_head and stage == 0 and narrow:
                grads += self._element * trained[i]
            freed += self._kept(i)
        return most

    def _work(self, i: int) -> Operators:
        kind = type(self.costs[i].unit)
        if kind not in self.works:
            self.works[kind] = operators(self.costs[i].unit, self.memory.step.micro_batch, self.fused)
        return self.works[kind]

    def _widest(self, work: Operators) -> float:
        """Return the elements of the widest tensor between column and row maps, on this rank."""
        return max(
            (self._local(x.tokens * x.d_out) for x in work.linears if x.split in ("column", "memory")), default=0.0
        )

    def _stream(self, work: Operators) -> float:
        split = self.memory.parallel.tensor if self.memory.parallel.sequence else 1
        widths = {"column": (0, split), "memory": (0, 1), "row": (1, split), "whole": (1, split)}
        sizes = [(x.tokens * (x.d_in, x.d_out)[widths[x.split][0]], widths[x.split][1]) for x in work.linears]
        return max((size / divisor for size, divisor in sizes), default=0.0)

    def _scores(self, work: Operators) -> float:
        return max((self._local(x.score_elements) for x in work.attentions if not x.fused), default=0.0)

    def _forward(self, i: int) -> float:
        return self._once(i, FORWARD, self._unit_forward)

    def _backward(self, i: int) -> float:
        return self._once(i, BACKWARD, self._unit_backward)

    def _once(self, i: int, kind: str, count: Callable[[int], float]) -> float:
        """Return count(i), computed once for equal units."""
        unit = self.costs[i].unit
        key = (kind, type(unit), unit.recompute, self.infos[i].trained, self.infos[i].below_trained)
        if key not in self.counted:
            self.counted[key] = count(i)
        return self.counted[key]

    def _unit_forward(self, i: int) -> float:
        memory = self.memory.for_unit(self.costs[i].unit)
        if memory is not self.memory:
            return replace(self, memory=memory, works={})._unit_forward(i)
        work, element = self._work(i), self.memory.step.micro_batch.element_bytes
        if work.vocabulary:
            return self._loss(i)
        return element * (2 * self._stream(work) + self._widest(work) + 2 * self._scores(work))

    def _unit_backward(self, i: int) -> float:
        work, cost = self._work(i), self.costs[i]
        element = self.memory.step.micro_batch.element_bytes
        if work.vocabulary:
            return 2 * self._element * self._stream_of_head(i)
        found = element * (3 * self._stream(work) + 2 * self._widest(work) + 2 * self._scores(work))
        if cost.unit.recompute != "none":
            found += (cost.cost.activation_bytes - cost.kept_bytes) / self.memory.parallel.tensor
        return found

    def _stream_of_head(self, i: int) -> float:
        head = self._work(i).vocabulary
        return float(head.tokens * head.d_model) if head else 0.0

    def _loss(self, i: int) -> float:
        """Return logits of a chunk with their gradients, and the fp32 sum of the weights' gradient over chunks."""
        head = self._work(i).vocabulary
        assert head is not None
        columns = self._local(head.size)
        logits = min(head.tokens, head.chunk) * columns * (FP32 + self._element)
        several = head.tokens > head.chunk and self.infos[i].trained
        weight = columns * head.d_model * (FP32 if several and self._element < FP32 else 0)
        if several and not self.on_gpu and self._element < FP32:
            weight *= 2  # a CPU multiplies fp32 copies
        return logits + weight
