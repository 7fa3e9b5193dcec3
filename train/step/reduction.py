"""Reduce the statistics of a step's rows over all replicas, and what ranks report of a step over all ranks.

Both are one small all-reduce each, on the host: neither waits for a GPU. Rows are agreed on steps ahead, by the leaders
of the replicas (train/step/step_reader.py).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from enum import Enum, auto
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import ConfigurationError, ReadingStopped
from data.stream import Batch, StepData
from parallel.distributed import gather_objects
from parallel.layout import Layout
from parallel.process_groups import sum_over
from train.health.stragglers import RankTimes

MICRO = 1e6  # seconds are sent as whole microseconds
MOST_CAUSES = 256  # causes of skipped records that are counted one by one; 2 kB of each step's message
OTHER_CAUSES = "other causes"
PIECE = 64  # items of a rank that the main rank receives at a time
NUM_TIMES = len(astuple(RankTimes()))
Item = TypeVar("Item")


class Operation(Enum):
    """The operation that reduces the numbers of all replicas to one."""

    SUM = auto()
    MAX = auto()


SUM, MAX = Operation.SUM, Operation.MAX
Table = Mapping[str, tuple[int, Operation]]


@dataclass
class RankStats:
    """The statistics of a step's rows of one replica, as its leader counts them."""

    num_micro_batches: int = 0
    num_targets: int = 0
    encoder_tokens: int = 0
    images: int = 0
    examples: dict[str, int] = field(default_factory=dict)
    """By objective; every rank must list the same ones."""
    components: dict[str, int] = field(default_factory=dict)
    """Examples by component of the mixture; every rank must list the same ones."""
    truncated: int = 0
    """Examples whose text was cut to fit a row."""
    positions: int = 0
    """Encoder and decoder positions of the micro-batches as they are computed, padding included."""
    empty_positions: int = 0
    """Positions of a micro-batch without examples, which is added where another rank has more."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Records by "<source>/<cause>"."""
    error: ReadingStopped | None = None
    """The error that ended reading."""

    def table(self) -> Table:
        """Return each number under its name, with the operation that reduces it."""
        return {
            "num_micro_batches": (self.num_micro_batches, SUM),
            "num_targets": (self.num_targets, SUM),
            "encoder_tokens": (self.encoder_tokens, SUM),
            "images": (self.images, SUM),
            "truncated": (self.truncated, SUM),
            "positions": (self.positions, SUM),
            "most_micro_batches": (self.num_micro_batches, MAX),
            "empty_positions": (self.empty_positions, MAX),
            "error": (self.error is not None, MAX),
            **{f"examples/{name}": (count, SUM) for name, count in self.examples.items()},
            **{f"components/{name}": (count, SUM) for name, count in self.components.items()},
        }


@dataclass
class RankReport:
    """The report of one rank of a step."""

    data_wait_s: float = 0.0
    memory_bytes: int = 0
    stop: bool = False
    """A signal requests to end the run after this step."""
    save: bool = False
    """A checkpoint is due after this step."""
    times: RankTimes | None = None
    """Times of the previous step; None where there was none."""


@dataclass
class StepStats:
    """The statistics of a step, the same on every rank: sums over the global batch, and maxima over all ranks.

    Those that ranks report (`RankReport`) are 0 until `PendingReports` adds them.
    """

    num_micro_batches: int
    """The maximum over ranks; ranks with fewer add empty ones."""
    num_targets: int
    encoder_tokens: int
    images: int
    examples: dict[str, int]
    data_wait_s: float = 0.0
    memory_bytes: int = 0
    stop: bool = False
    save: bool = False
    skipped: dict[str, int] = field(default_factory=dict)
    components: dict[str, int] = field(default_factory=dict)
    times: Tensor = field(default_factory=lambda: no_times(), compare=False)
    """float64 [ranks, 3], each rank's `RankTimes` of the previous step; [0, 3] where there was none."""
    positions: int = 0
    """Computed positions, those of added micro-batches included."""
    truncated: int = 0
    added_micro_batches: int = 0
    """Micro-batches without examples that ranks compute because another one has more."""


class SkipCauses:
    """List the causes of skipped records, so that all leaders count each at the same place of their message.

    The list grows on all of them alike. The first step in which one skips a record for a new cause has a second
    exchange, of objects. Once the list is full (`MOST_CAUSES`), a new cause counts among its source's other causes.
    """

    def __init__(self) -> None:
        self.names: dict[str, None] = {}  # "<source>/<cause>", in the order in which they first occurred

    def split(self, skipped: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
        """Return the counts of every listed cause, and of the causes that are new."""
        listed, new = dict.fromkeys(self.names, 0), Counter[str]()
        for cause, count in skipped.items():
            counts = listed if (name := self._name(cause)) in listed else new
            counts[name] += count
        return listed, dict(new)

    def add(self, new: Mapping[str, int], group: dist.ProcessGroup) -> dict[str, int]:
        """List the new causes of all ranks of a group, and return the sum of their counts; a collective of it."""
        counts = Counter[str]()
        for cause, count in sorted(item for own in gather_objects([new], group) for item in own.items()):
            name = self._name(cause)
            self.names.setdefault(name)
            counts[name] += count
        return dict(counts)

    def _name(self, cause: str) -> str:
        """Return the name under which a cause is counted."""
        if cause in self.names or len(self.names) < MOST_CAUSES:
            return cause
        return f"{cause.partition('/')[0]}/{OTHER_CAUSES}"


def reduce_stats(own: RankStats, causes: SkipCauses, leaders: dist.ProcessGroup) -> StepStats:
    """Return the statistics of a step's rows over all replicas; a collective of their leaders.

    Raises ReadingStopped on every leader where reading ended on one, so that none waits for one that has left.
    """
    listed, new = causes.split(own.skipped)
    table = {
        **own.table(),
        **{f"skipped/{cause}": (count, SUM) for cause, count in listed.items()},
        "has_new_causes": (bool(new), MAX),
    }
    found = all_reduce(table, leaders)
    if found["error"]:
        raise_everywhere(own.error, leaders)
    skipped = Counter({cause: found[f"skipped/{cause}"] for cause in listed})
    if found["has_new_causes"]:
        skipped.update(causes.add(new, leaders))
    added = found["most_micro_batches"] * leaders.size() - found["num_micro_batches"]
    return StepStats(
        num_micro_batches=found["most_micro_batches"],
        num_targets=found["num_targets"],
        encoder_tokens=found["encoder_tokens"],
        images=found["images"],
        examples={name: found[f"examples/{name}"] for name in own.examples},
        components={name: found[f"components/{name}"] for name in own.components},
        truncated=found["truncated"],
        positions=found["positions"] + added * found["empty_positions"],
        added_micro_batches=added,
        skipped={cause: count for cause, count in sorted(skipped.items()) if count},
    )


def all_reduce(table: Table, group: dist.ProcessGroup) -> dict[str, int]:
    """Return each number of `table` reduced over a group; a collective of it.

    It is one sum: each rank fills only its own row of `rows`, so that their sum holds the numbers of every rank, and
    their maxima. All ranks must list the same names in the same order.
    """
    sums = {name: int(number) for name, (number, operation) in table.items() if operation is SUM}
    maxima = {name: int(number) for name, (number, operation) in table.items() if operation is MAX}
    rows = torch.zeros(group.size(), len(maxima), dtype=torch.int64)
    rows[group.rank()] = torch.tensor(list(maxima.values()), dtype=torch.int64)
    message = torch.cat([rows.flatten(), torch.tensor(list(sums.values()), dtype=torch.int64)])
    if group.size() > 1:
        sum_over(message, group)
    rows, totals = message.split([rows.numel(), len(sums)])
    most = rows.view(group.size(), len(maxima)).amax(0)
    return dict(zip([*sums, *maxima], [*totals.tolist(), *most.tolist()], strict=True))


class PendingReports:
    """Exchange the reports of all ranks while the step computes; a collective that begins here.

    A message of the host, so that it waits for no GPU.
    """

    def __init__(self, own: RankReport, layout: Layout) -> None:
        numbers = [int(own.data_wait_s * MICRO), own.memory_bytes, own.stop, own.save, own.times is not None]
        times = [int(seconds * MICRO) for seconds in astuple(own.times or RankTimes())]
        row = torch.tensor([*map(int, numbers), *times], dtype=torch.int64)
        self._rows = torch.zeros(layout.world_size, len(row), dtype=torch.int64)  # each rank fills its own
        self._rows[layout.rank] = row
        self._work = dist.all_reduce(self._rows, async_op=True) if layout.world_size > 1 else None

    def add_to(self, stats: StepStats) -> StepStats:
        """Wait for the reports, and return the statistics with them."""
        if self._work is not None:
            self._work.wait()
        reports, times = self._rows.split([self._rows.shape[1] - NUM_TIMES, NUM_TIMES], dim=1)
        data_wait_us, memory_bytes, stop, save, has_times = reports.amax(0).tolist()
        return replace(
            stats,
            data_wait_s=data_wait_us / MICRO,
            memory_bytes=memory_bytes,
            stop=bool(stop),
            save=bool(save),
            times=times.double() / MICRO if has_times else no_times(),
        )


def no_times() -> Tensor:
    """Return the times of no rank, float64 [0, 3]."""
    return torch.zeros(0, NUM_TIMES, dtype=torch.float64)


def raise_everywhere(own: ReadingStopped | ConfigurationError | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise the error of the lowest rank that has one, on every rank of a group (the world); a collective of it."""
    for error in filter(None, gather_objects([own], group)):
        if isinstance(error, ReadingStopped):
            error.alone = False
        raise error


def in_lockstep(batches: Iterable[StepData[Batch]], device: torch.device) -> Iterator[StepData[Batch]]:
    """Yield the batches that hold an example on any rank; a collective, of two numbers, at each.

    Every rank must have equally many. Raises ReadingStopped on every rank where reading ended on one.
    """
    for batch in batches:
        stopped, full = sums([batch.error is not None, bool(batch.infos)], device)
        if stopped:
            raise_everywhere(batch.error)
        if full:
            yield batch


def sums(numbers: Sequence[int], device: torch.device, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> list[int]:
    """Return the numbers, each summed over all ranks; a collective."""
    message = torch.tensor(list(map(int, numbers)), device=device)
    if dist.is_initialized():
        dist.all_reduce(message, op)
    return [int(number) for number in message.tolist()]


def gather_to_main(items: list[Item], device: torch.device) -> list[Item]:
    """Return the items of all ranks on the main rank, `PIECE` of each at a time, and none elsewhere; a collective."""
    if not dist.is_initialized():
        return items
    found: list[Item] = []
    (most,) = sums([len(items)], device, dist.ReduceOp.MAX)
    for start in range(0, most, PIECE):
        everywhere: list[list[Item]] | None = None
        if dist.get_rank() == 0:
            everywhere = [[] for _ in range(dist.get_world_size())]
        dist.gather_object(items[start : start + PIECE], everywhere)
        found += [item for own in everywhere or [] for item in own]
    return found
