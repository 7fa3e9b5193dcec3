"""What all ranks agree on in each step, in one small all-reduce."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from common.errors import ConfigurationError, ReadingStopped
from parallel.distributed import gather_objects
from train.health.stragglers import RankTimes

MICRO = 1e6  # seconds travel as whole microseconds
MOST_CAUSES = 256  # causes of skipped records that are counted one by one; 2 kB of each step's message
OTHER_CAUSES = "other causes"
PIECE = 64  # items of a rank that the first one receives at a time
NUM_TIMES = len(astuple(RankTimes()))
Item = TypeVar("Item")


@dataclass
class Local:
    """One rank's part of a step. Token, image and example counts are of this rank's data-parallel share.

    `positions` are those of its micro-batches as they are computed, padding included; `empty_positions` those of a
    micro-batch that it adds where another rank has more. `stopped`: what ended its reading.
    `times`: how long the step before took here, None where there was none.
    """

    num_micro_batches: int = 0
    num_targets: int = 0
    encoder_tokens: int = 0
    images: int = 0
    examples: Sequence[int] = ()  # by objective
    components: Sequence[int] = ()  # examples by component of the mixture
    truncated: int = 0  # examples whose text was cut to fit a row
    positions: int = 0
    empty_positions: int = 0
    stopped: ReadingStopped | None = None
    data_wait_s: float = 0.0
    memory_bytes: int = 0
    stop: bool = False
    save: bool = False
    skipped: dict[str, int] = field(default_factory=dict)  # "<source>/<cause>" -> records
    times: RankTimes | None = None


@dataclass
class Agreed:
    """The same on every rank: sums over the global batch, and the largest of what each rank reported.

    `times`: float64 [ranks, 3], the fields of each rank's `RankTimes` of the step before; [0, 3] where there was none.
    `added_micro_batches`: those without an example that ranks compute because another one has more.
    """

    num_micro_batches: int
    num_targets: int
    encoder_tokens: int
    images: int
    examples: list[int]
    data_wait_s: float
    memory_bytes: int
    stop: bool
    save: bool
    skipped: dict[str, int]
    components: list[int] = field(default_factory=list)
    times: torch.Tensor = field(default_factory=lambda: no_times(), compare=False)
    positions: int = 0  # that are computed, of the micro-batches that are added too
    truncated: int = 0
    added_micro_batches: int = 0


class Agreement:
    """Sums and maxima over all ranks, in one all-reduce a step.

    Maxima come out of a sum because every rank has a row of its own. Ranks that hold the same rows (tensor or pipeline
    parallel) count them equally often, so sums are divided by their number.

    Skipped records are counted by a table of causes that grows on all ranks alike. The first step in which a rank
    skips a record for a new cause has a second exchange, of objects. Once the table is full (`MOST_CAUSES`), a new
    cause counts among its source's other causes.
    """

    def __init__(
        self, data_parallel_size: int, device: torch.device, num_objectives: int = 0, num_components: int = 0
    ) -> None:
        self.device = device
        self.world, self.rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        self.sharing = self.world // data_parallel_size
        self.num_objectives, self.num_components = num_objectives, num_components
        self.causes: dict[str, int] = {}  # "<source>/<cause>" -> place in the message

    def agree(self, local: Local) -> Agreed:
        """Return what all ranks agree on; a collective.

        Raises ReadingStopped on every rank where one of them was stopped: nobody waits for a rank that has left.
        """
        known, new = self._by_cause(local.skipped)
        table, totals = self._exchanged(local, known, bool(new))
        columns = table[:, :-NUM_TIMES]
        most_micro_batches, _, empty_positions, stopped, data_wait, memory, stop, save, unknown, timed = columns.amax(
            0
        ).tolist()
        if stopped:
            raise_everywhere(local.stopped)
        num_micro_batches, positions = columns[:, :2].sum(0).tolist()
        added = most_micro_batches * self.world - num_micro_batches
        head, examples, components, counts = totals.split(
            [4, self.num_objectives, self.num_components, len(self.causes)]
        )
        num_targets, encoder_tokens, images, truncated = head.tolist()
        skipped = dict(zip(self.causes, counts.tolist(), strict=True))
        if unknown:
            skipped = self._with_new_causes(skipped, new)
        return Agreed(
            num_micro_batches=most_micro_batches,
            num_targets=num_targets,
            encoder_tokens=encoder_tokens,
            images=images,
            truncated=truncated,
            examples=examples.tolist(),
            components=components.tolist(),
            data_wait_s=data_wait / MICRO,
            memory_bytes=memory,
            stop=bool(stop),
            save=bool(save),
            skipped={cause: count for cause, count in sorted(skipped.items()) if count},
            times=table[:, -NUM_TIMES:].double() / MICRO if timed else no_times(),
            positions=(positions + added * empty_positions) // self.sharing,
            added_micro_batches=added // self.sharing,
        )

    def _exchanged(self, local: Local, known: list[int], unknown: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(a row of every rank, sums over the global batch), both int64 on the host."""
        row = [
            local.num_micro_batches,
            local.positions,
            local.empty_positions,
            local.stopped is not None,
            int(local.data_wait_s * MICRO),
            local.memory_bytes,
            local.stop,
            local.save,
            unknown,
            local.times is not None,
            *(int(seconds * MICRO) for seconds in astuple(local.times or RankTimes())),
        ]
        totals = [
            *(local.num_targets, local.encoder_tokens, local.images, local.truncated),
            *(local.examples or [0] * self.num_objectives),
            *(local.components or [0] * self.num_components),
            *known,
        ]
        table = torch.zeros(self.world, len(row), dtype=torch.int64)
        table[self.rank] = torch.tensor(row, dtype=torch.int64)
        message = torch.cat([table.flatten(), torch.tensor(totals, dtype=torch.int64)]).to(self.device)
        if self.world > 1:
            dist.all_reduce(message)
        message = message.cpu()
        return message[: table.numel()].view_as(table), message[table.numel() :] // self.sharing

    def _by_cause(self, skipped: dict[str, int]) -> tuple[list[int], dict[str, int]]:
        """(counts of the causes in the table, in its order; those of causes that are not)."""
        known, new = [0] * len(self.causes), dict[str, int]()
        for cause, count in skipped.items():
            name = self._listed(cause)
            if name in self.causes:
                known[self.causes[name]] += count
            else:
                new[name] = new.get(name, 0) + count
        return known, new

    def _listed(self, cause: str) -> str:
        """The name under which a cause is counted."""
        full = len(self.causes) >= MOST_CAUSES
        return f"{cause.partition('/')[0]}/{OTHER_CAUSES}" if full and cause not in self.causes else cause

    def _with_new_causes(self, skipped: dict[str, int], new: dict[str, int]) -> dict[str, int]:
        """`skipped` with every rank's counts of `new` causes, which enter the table; a collective."""
        everywhere: dict[str, int] = {}
        for cause, count in sorted(item for one in gather_objects([new]) for item in one.items()):
            name = self._listed(cause)
            self.causes.setdefault(name, len(self.causes))
            everywhere[name] = everywhere.get(name, 0) + count
        return skipped | {name: skipped.get(name, 0) + count // self.sharing for name, count in everywhere.items()}


def no_times() -> torch.Tensor:
    """The times of no rank."""
    return torch.zeros(0, NUM_TIMES, dtype=torch.float64)


def raise_everywhere(found: ReadingStopped | ConfigurationError | None) -> None:
    """Raise on every rank what the first rank that cannot read has `found`; a collective."""
    for error in filter(None, gather_objects([found])):
        if isinstance(error, ReadingStopped):
            error.alone = False
        raise error


def together(
    batches: Iterable[Item], device: torch.device, is_empty: Callable[[Item], bool] = lambda batch: False
) -> Iterator[Item]:
    """The batches, of which every rank has equally many; a collective, of two numbers, at each.

    Those that are empty on all ranks are left out. Raises ReadingStopped on every rank where reading raised it on one.
    """
    iterator = iter(batches)
    while True:
        batch, found = None, None
        try:
            batch = next(iterator, None)
        except ReadingStopped as error:
            found = error
        stopped, full = sums([found is not None, batch is not None and not is_empty(batch)], device)
        if stopped:
            raise_everywhere(found)
        if batch is None:
            return
        if full:
            yield batch


def sums(numbers: Sequence[int], device: torch.device, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> list[int]:
    """The numbers, summed over all ranks; a collective."""
    message = torch.tensor(list(map(int, numbers)), device=device)
    if dist.is_initialized():
        dist.all_reduce(message, op)
    return [int(number) for number in message.tolist()]


def gather_to_first(items: list[Any], device: torch.device) -> list[Any]:
    """The items of all ranks on the first one, `PIECE` of each at a time; elsewhere nothing. A collective."""
    if not dist.is_initialized():
        return items
    found: list[Any] = []
    (most,) = sums([len(items)], device, dist.ReduceOp.MAX)
    for start in range(0, most, PIECE):
        everywhere: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(items[start : start + PIECE], everywhere)
        found += [item for one in everywhere or [] for item in one]
    return found
