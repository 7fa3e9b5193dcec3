"""Count the collectives of one rank's step: how many of each kind and group size, and the bytes of their whole tensors.

Tensor-parallel ones are those that `UnitClock` takes seconds for; sizes of buckets and messages are exact, from the
rank's own parameters on `meta`. `benchmarks.scale` compares them with those of the program.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from model.layers import parameter_info
from model.pali import PaLI
from parallel.engine.buckets import Bucket
from parallel.pipeline.schedule import CarryPlan, CarrySizes
from parallel.plan.blueprint import Ballast
from parallel.plan.buckets import REPLICATED_BUCKET, joined
from parallel.plan.collectives import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER
from parallel.plan.gathered import num_kept
from parallel.plan.step_time import StepModel
from parallel.shards import is_sharded

MESSAGE = "message"
FP32, FP64 = 4, 8  # bytes
Kind = tuple[str, int]  # of a collective, and ranks of its group


@dataclass
class Traffic:
    """Calls and bytes of the collectives of a step, by kind and ranks of the group."""

    calls: Counter[Kind]
    whole_bytes: Counter[Kind]

    def amount(self, kind: Kind) -> tuple[int, int]:
        """Return the calls and bytes of one kind."""
        return self.calls[kind], self.whole_bytes[kind]

    def add(self, kind: str, ranks: int, size: float, times: int = 1) -> None:
        """Count a collective that is sent several times; one of a single rank sends nothing."""
        if ranks > 1 and times:
            self.calls[kind, ranks] += times
            self.whole_bytes[kind, ranks] += round(size) * times


class RankTraffic:
    """Count for one rank; `plan` has the shapes of its tensor-parallel ranks, frozen as it is trained."""

    def __init__(self, model: StepModel, starts: Sequence[int], plan: PaLI, rank: int) -> None:
        self.model, self.plan, self.parallel = model, plan, model.parallel
        pipeline_rank, in_stage = divmod(rank, self.parallel.tensor * model.data_parallel_size)
        self.data_rank = in_stage // self.parallel.tensor
        self.own = model.stages(starts)[pipeline_rank :: self.parallel.pipeline]
        self.units = [unit for _, unit in plan.units()]
        self.names = [name for name, _ in plan.units()]
        self.passes, self.data = model.pipeline.run_micro_batches, model.data_parallel_size
        self.element = model.step.micro_batch.element_bytes
        self.found = Traffic(Counter(), Counter())

    def count(self) -> Traffic:
        """Return the collectives of a step."""
        for stage in self.own:
            self._tensor(stage)
            self._gathers(stage)
        if self.parallel.zero_stage:
            self._zero()
        else:
            self._replicated([p for first, end, _ in self.own for i in range(first, end) for p in self._trained(i)])
        self._messages()
        self._update()
        return self.found

    def _trained(self, unit: int) -> list[nn.Parameter]:
        return [p for p in self.units[unit].parameters() if p.requires_grad]

    def _tensor(self, stage: tuple[int, int, bool]) -> None:
        """Count the collectives of the units between tensor-parallel ranks."""
        first, end, _ = stage
        for time in [*self.model.unit_times[first:end], self.model.encoder_output(first, end)]:
            for each in (*time.forward.exchanges, *time.backward.exchanges):
                self.found.add(each.kind, self.parallel.tensor, each.whole_bytes, self.passes)

    def _gathers(self, stage: tuple[int, int, bool]) -> None:
        """Count ZeRO-3's gathers: before the passes of every unit, or once a step."""
        if self.parallel.zero_stage < 3:
            return
        first, end, last = stage
        infos = self.model.infos[first:end]
        sharded = [[p for p in self.units[i].parameters() if self._is_sharded(p)] for i in range(first, end)]
        own = [i for i, parameters in enumerate(sharded) if parameters]
        kept = num_kept([sum(p.numel() for p in sharded[i]) for i in own]) if last else 0
        for place, i in enumerate(own):
            again = place < len(own) - kept and (infos[i].trained or infos[i].below_trained)
            times = 1 if self.parallel.gather == "step" else self.passes * (1 + again)
            size = sum(self._padded(p.numel()) for p in sharded[i])
            self.found.add(ALL_GATHER, self.data, self.element * size, times)

    def _zero(self) -> None:
        """Count the sums of gradients bucket by bucket, and the sending of new weights that ranks hold whole."""
        every = self.parallel.reduce == "micro_batch"
        units = [[self._trained(i) for i in range(first, end)] for first, end, _ in self.own]
        if not any(own for stage in units for own in stage):
            units.append([list(Ballast(torch.device("meta"), torch.float32).parameters())])
        narrow, copies = 2 if self.parallel.reduce_dtype == "bf16" else FP32, 0
        for bucket in (bucket for stage in units for bucket in self._buckets(stage)):
            self.found.add(REDUCE_SCATTER, self.data, narrow * bucket.numel, self.passes if every else 1)
            if not bucket.divided:
                self.found.add(ALL_GATHER, self.data, self.element * bucket.numel)
            copies += sum(piece.size for p, piece in bucket.placed() if not parameter_info(p).split)
        self._join_copies(copies)

    def _buckets(self, stage: Sequence[Sequence[nn.Parameter]]) -> Iterator[Bucket]:
        """Make the buckets of a stage's units: of whole parameters, and of those that ZeRO-3 divides."""
        for divided in (False, True):
            chosen = [[p for p in own if self._is_sharded(p) == divided] for own in stage]
            for numbers in joined([sum(p.numel() for p in own) for own in chosen]):
                parameters = [p for number in numbers for p in chosen[number]]
                yield Bucket(parameters, self.data, self.data_rank, divided)

    def _replicated(self, trained: Sequence[nn.Parameter]) -> None:
        """Count the sums of gradients over replicas."""
        self._join_copies(sum(p.numel() for p in trained if not parameter_info(p).split))
        narrow = 2 if self.parallel.reduce_dtype == "bf16" else FP32
        size = 0
        for p in trained:
            if size and size + p.numel() > REPLICATED_BUCKET:
                self.found.add(ALL_REDUCE, self.data, narrow * size)
                size = 0
            size += p.numel()
        self.found.add(ALL_REDUCE, self.data, narrow * size, int(size > 0))

    def _join_copies(self, elements: int) -> None:
        """Count the sum of gradients that every tensor-parallel rank holds: one message a step."""
        self.found.add(ALL_REDUCE, self.parallel.tensor, FP32 * elements, int(elements > 0))

    def _messages(self) -> None:
        """Count what the rank sends to its neighbors: outputs of its stages, and gradients of their inputs."""
        if self.parallel.pipeline == 1:
            return
        shape = self.model.step.micro_batch
        sizes = CarrySizes(shape.images, shape.rows, shape.encoder_tokens, shape.decoder_tokens)
        carries, dtype = CarryPlan(self.plan, self.parallel), torch.bfloat16 if self.element == 2 else torch.float32
        for first, end, last in self.own:
            given: list[Any] = [] if last else list(carries.after(self.names[end - 1], sizes, dtype))
            taken = carries.after(self.names[first - 1], sizes, dtype) if first else ()
            for x in [*given, *(x for x in taken if x.requires_grad)]:
                self.found.add(MESSAGE, self.parallel.pipeline, x.nbytes, self.passes)

    def _update(self) -> None:
        """Count the totals of the loss, the norm of the gradient, and the optimizer's sums."""
        p, placement = self.parallel, self.model.placement
        world = p.tensor * p.pipeline * self.data
        head: Any = next(unit for unit in self.units if unit.gives_loss)
        self.found.add(ALL_REDUCE, world, 4 * FP32 * head.num_objectives)
        self.found.add(ALL_REDUCE, world if p.zero_stage else p.tensor * p.pipeline, FP64)
        group = placement.stage if p.zero_stage else placement.tensor
        own = [info for first, end, _ in self.own for info in self.model.infos[first:end]]
        nothing = [0 for _ in self.model.summed(self.model.infos)]  # a rank that trains nothing takes part
        for numbers in self.model.summed(own) or nothing:
            self.found.add(ALL_REDUCE, group.size, FP32 * numbers)

    def _is_sharded(self, p: nn.Parameter) -> bool:
        return self.parallel.zero_stage == 3 and is_sharded(p.numel(), p.requires_grad, self.parallel)

    def _padded(self, elements: int) -> int:
        return -(-elements // self.data) * self.data
