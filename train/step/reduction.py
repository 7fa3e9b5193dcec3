"""Reduce the statistics of a step over all ranks, in one small all-reduce."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from enum import Enum, auto
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import ConfigurationError, ReadingStopped
from data.stream import Batch, StepData
from parallel.distributed import gather_objects
from parallel.layout import Layout
from train.health.stragglers import RankTimes

MICRO = 1e6  # seconds are sent as whole microseconds
MOST_CAUSES = 256  # causes of skipped records that are counted one by one; 2 kB of each step's message
OTHER_CAUSES = "other causes"
PIECE = 64  # items of a rank that the main rank receives at a time
NUM_TIMES = len(astuple(RankTimes()))
Item = TypeVar("Item")


class Operation(Enum):
    """The operation that reduces the numbers of all ranks to one."""

    SUM = auto()  # over replicas: all ranks of a replica hold the same rows -> they count once
    MAX = auto()  # over ranks


SUM, MAX = Operation.SUM, Operation.MAX
Table = Mapping[str, tuple[int, Operation]]


@dataclass
class RankStats:
    """One rank's statistics of a step; tokens, images and examples are those that its replica read."""

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
    data_wait_s: float = 0.0
    memory_bytes: int = 0
    stop: bool = False
    """A signal requests to end the run after this step."""
    save: bool = False
    """A checkpoint is due after this step."""
    times: RankTimes | None = None
    """Times of the previous step; None where there was none."""

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
            "data_wait_us": (int(self.data_wait_s * MICRO), MAX),
            "memory_bytes": (self.memory_bytes, MAX),
            "stop": (self.stop, MAX),
            "save": (self.save, MAX),
            "has_times": (self.times is not None, MAX),
            **{f"examples/{name}": (count, SUM) for name, count in self.examples.items()},
            **{f"components/{name}": (count, SUM) for name, count in self.components.items()},
        }


@dataclass
class StepStats:
    """The statistics of a step, the same on every rank: sums over the global batch, and maxima over all ranks."""

    num_micro_batches: int
    """The maximum over ranks; ranks with fewer add empty ones."""
    num_targets: int
    encoder_tokens: int
    images: int
    examples: dict[str, int]
    data_wait_s: float
    memory_bytes: int
    stop: bool
    save: bool
    skipped: dict[str, int]
    components: dict[str, int] = field(default_factory=dict)
    times: Tensor = field(default_factory=lambda: no_times(), compare=False)
    """float64 [ranks, 3], each rank's `RankTimes` of the previous step; [0, 3] where there was none."""
    positions: int = 0
    """Computed positions, those of added micro-batches included."""
    truncated: int = 0
    added_micro_batches: int = 0
    """Micro-batches without examples that ranks compute because another one has more."""


class SkipCauses:
    """List the causes of skipped records, so that all ranks count each at the same place of their message.

    The list grows on all ranks alike. The first step in which a rank skips a record for a new cause has a second
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

    def add(self, new: Mapping[str, int]) -> dict[str, int]:
        """List the new causes of all ranks, and return their counts summed over ranks; a collective."""
        counts = Counter[str]()
        for cause, count in sorted(item for own in gather_objects([new]) for item in own.items()):
            name = self._name(cause)
            self.names.setdefault(name)
            counts[name] += count
        return dict(counts)

    def _name(self, cause: str) -> str:
        """Return the name under which a cause is counted."""
        if cause in self.names or len(self.names) < MOST_CAUSES:
            return cause
        return f"{cause.partition('/')[0]}/{OTHER_CAUSES}"


def reduce_stats(own: RankStats, causes: SkipCauses, layout: Layout) -> StepStats:
    """Return the statistics of a step over all ranks; a collective.

    Raises ReadingStopped on every rank where reading ended on one, so that no rank waits for one that has left.
    """
    listed, new = causes.split(own.skipped)
    table = {
        **own.table(),
        **{f"skipped/{cause}": (count, SUM) for cause, count in listed.items()},
        "has_new_causes": (bool(new), MAX),
    }
    found, times = all_reduce(table, [int(seconds * MICRO) for seconds in astuple(own.times or RankTimes())], layout)
    if found["error"]:
        raise_everywhere(own.error)
    skipped = Counter({cause: found[f"skipped/{cause}"] for cause in listed})
    if found["has_new_causes"]:
        replica_size = layout.world_size // layout.data_parallel_size
        skipped.update({cause: count // replica_size for cause, count in causes.add(new).items()})
    added = found["most_micro_batches"] * layout.data_parallel_size - found["num_micro_batches"]
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
        data_wait_s=found["data_wait_us"] / MICRO,
        memory_bytes=found["memory_bytes"],
        stop=bool(found["stop"]),
        save=bool(found["save"]),
        times=times.double() / MICRO if found["has_times"] else no_times(),
    )


def all_reduce(table: Table, per_rank: Sequence[int], layout: Layout) -> tuple[dict[str, int], Tensor]:
    """Return each number of `table` reduced over all ranks, and every rank's `per_rank`, int64 [ranks, n].

    A collective of one sum: each rank fills only its own row of `rows`, so that their sum holds the numbers of every
    rank, and their maxima. All ranks must list the same names in the same order.
    """
    sums = {name: int(number) for name, (number, operation) in table.items() if operation is SUM}
    maxima = {name: int(number) for name, (number, operation) in table.items() if operation is MAX}
    row = torch.tensor([*per_rank, *maxima.values()], dtype=torch.int64)
    rows = torch.zeros(layout.world_size, len(row), dtype=torch.int64)
    rows[layout.rank] = row
    message = torch.cat([rows.flatten(), torch.tensor(list(sums.values()), dtype=torch.int64)]).to(layout.device)
    if layout.world_size > 1:
        dist.all_reduce(message)
    rows, totals = message.cpu().split([rows.numel(), len(sums)])
    rows = rows.view(layout.world_size, len(row))
    totals = totals // (layout.world_size // layout.data_parallel_size)  # each rank of a replica counts the same rows
    most = rows[:, len(per_rank) :].amax(0)
    reduced = dict(zip([*sums, *maxima], [*totals.tolist(), *most.tolist()], strict=True))
    return reduced, rows[:, : len(per_rank)]


def no_times() -> Tensor:
    """Return the times of no rank, float64 [0, 3]."""
    return torch.zeros(0, NUM_TIMES, dtype=torch.float64)


def raise_everywhere(own: ReadingStopped | ConfigurationError | None) -> None:
    """Raise the error of the lowest rank that has one, on every rank; a collective."""
    for error in filter(None, gather_objects([own])):
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
