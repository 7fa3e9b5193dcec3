"""Read each step's micro-batches and agree on their number over all replicas, several steps ahead."""

import time
from dataclasses import dataclass, replace
from functools import cached_property

from common.errors import ReadingStopped
from data.packing import Rows
from data.stream import StepData
from model.batch import MicroBatch
from parallel.layout import Layout
from parallel.process_groups import ReadingGroups
from train.config import RunConfig
from train.step.ahead import Ahead
from train.step.batch import compact, pins, rank_stats, to_tensors
from train.step.reader import ReplicaReader, broadcast
from train.step.reduction import SkipCauses, StepStats, reduce_stats


@dataclass
class StepInput:
    """One rank's data of a step, and the statistics of the rows of all replicas."""

    data: StepData[MicroBatch]
    stats: StepStats
    ranks_wait_s: float = 0.0
    """Seconds in which the reading thread waited for a thread beside it that waited for other ranks."""


@dataclass
class _Prepared:
    """A step as it was prepared: its data, or the error with which reading ends on all ranks."""

    data: StepData[MicroBatch]
    stats: StepStats | None
    error: ReadingStopped | None
    received_s: float
    """Time (`time.perf_counter`) at which this rank had the rows of its leader; 0 on the leader."""
    converted_s: float
    """Time at which the rows were tensors on this rank."""


class StepReader:
    """Read the micro-batches of each step of one split.

    Of a step, the leader of a replica reads the rows; the leaders of all replicas reduce their statistics; each leader
    sends rows and statistics to its replica; every rank converts them to tensors, page-locked where a GPU takes them.
    A thread does that for the next `data.prefetch` steps, with process groups of its own, so that its collectives do
    not interleave with those of training. With a prefetch of 0, the thread that reads does it.
    """

    def __init__(self, config: RunConfig, layout: Layout, reader: ReplicaReader) -> None:
        """`config`: that of the phase."""
        self.config, self.layout, self.reader = config, layout, reader
        self.causes = SkipCauses()
        self.empty: MicroBatch | None = None  # without examples; the same in every step
        self.ahead = Ahead(self._prepare, reader.prefetch)

    def __enter__(self) -> "StepReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Stop reading ahead; without an exception, all ranks do so after the same step."""
        self.ahead.close(together=kind is None)

    @cached_property
    def groups(self) -> ReadingGroups:
        """Return the groups of the thread that reads; the first access is a collective of the world."""
        return self.layout.background_reading_groups if self.reader.prefetch else self.layout.reading_groups

    def read(self, step: int) -> StepInput:
        """Return this rank's data of a step; a collective of all ranks.

        Its `data_wait_s` are the seconds of this call without the waits for other ranks. Raises ReadingStopped on every
        rank where reading ended on one.
        """
        began, _ = time.perf_counter(), self.groups
        found = self.ahead.read(step)
        if found.error is not None:
            raise found.error
        waited_s = time.perf_counter() - began
        own_s = min(waited_s, max(0.0, found.converted_s - max(began, found.received_s)))
        assert found.stats is not None
        ranks_wait_s = waited_s - own_s if self.reader.prefetch else 0.0
        return StepInput(replace(found.data, data_wait_s=own_s), found.stats, ranks_wait_s)

    def fill(self, step: StepInput) -> list[MicroBatch]:
        """Return the micro-batches, with empty ones added until this rank has as many as every other."""
        own = step.data.micro_batches
        assert self.empty is not None
        return own + [self.empty] * (step.stats.num_micro_batches - len(own))

    def _prepare(self, step: int) -> _Prepared:
        """Read, agree, send and convert the rows of a step; a collective of all ranks."""
        rows: StepData[Rows] | None = None
        stats, error, received_s = None, None, 0.0
        if self.layout.is_replica_leader:
            # Nobody will use it -> an empty step ends the collectives that other ranks have begun, without reading.
            rows = StepData([], []) if self.ahead.closing else self.reader.read(step)
            data, converted_s = self._convert(rows), time.perf_counter()
            try:
                assert self.groups.leaders is not None
                stats = reduce_stats(rank_stats(data, self.empty, self.config), self.causes, self.groups.leaders)
            except ReadingStopped as stopped:
                error = stopped
        rows, (stats, error) = broadcast(rows, (stats, error), self.layout, self.groups.replica)
        if not self.layout.is_replica_leader:
            assert rows is not None
            received_s = time.perf_counter()
            data, converted_s = self._convert(rows), time.perf_counter()
        return _Prepared(data, stats, error, received_s, converted_s)

    def _convert(self, rows: StepData[Rows]) -> StepData[MicroBatch]:
        """Return micro-batches as the engine takes them."""
        batches = [to_tensors(each) for each in rows.micro_batches]
        if self.empty is None and batches:
            self.empty = self._compact(batches[0].emptied())
        compacted = map(self._compact, batches)
        pin = pins(self.layout.device)
        return StepData([b.pinned() if pin else b for b in compacted], rows.infos, rows.skipped, error=rows.error)

    def _compact(self, batch: MicroBatch) -> MicroBatch:
        return compact(batch, self.config, self.layout.device)
