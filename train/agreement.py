"""What all ranks agree on in each step, in one small all-reduce."""

from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from errors import ReadingStopped
from train.rank_times import RankTimes

MICRO = 1e6  # seconds travel as whole microseconds
Item = TypeVar("Item")


@dataclass
class Local:
    """One rank's part of a step. Token, image and example counts are of this rank's data-parallel share.

    `positions` are those of its micro-batches as they are computed, padding included; `empty_positions` those of a
    micro-batch that it adds where another rank has more. `stopped`: what ended its reading.
    `times`: how long the step before took here, None where there was none.
    """

    num_micro_batches: int
    num_targets: int
    encoder_tokens: int
    images: int
    examples: list[int]  # by objective
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
    """The same on every rank: sums over the global batch, the largest of what each rank reported, and who took how
    long in the step before (`times`, by rank; empty where no rank knows)."""

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
    times: list[RankTimes] = field(default_factory=list)
    positions: int = 0  # that are computed, of the micro-batches that are added too
    truncated: int = 0


def agree(local: Local, data_parallel_size: int, device: torch.device) -> Agreed:
    """Sum and take maxima over all ranks in one all-reduce (a second one only in steps that skipped records).

    Maxima come out of a sum because every rank has a row of its own. Ranks that hold the same rows (tensor or pipeline
    parallel) count them equally often, so sums are divided by their number. Raises ReadingStopped on every rank where
    one of them raised it: nobody waits for a rank that has left.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    times = astuple(local.times or RankTimes())
    columns = [
        local.num_micro_batches,
        local.positions,
        local.empty_positions,
        local.stopped is not None,
        int(local.data_wait_s * MICRO),
        local.memory_bytes,
        local.stop,
        local.save,
        bool(local.skipped),
        local.times is not None,
        *(int(seconds * MICRO) for seconds in times),
    ]
    totals = [local.num_targets, local.encoder_tokens, local.images, local.truncated, *local.examples]
    table = torch.zeros(world, len(columns), dtype=torch.int64)
    table[rank] = torch.tensor(columns, dtype=torch.int64)
    message = torch.cat([table.flatten(), torch.tensor(totals, dtype=torch.int64)]).to(device)
    if world > 1:
        dist.all_reduce(message)
    message = message.cpu()
    rows = message[: table.numel()].view_as(table)
    most_micro_batches, _, empty_positions, stopped, data_wait, memory, stop, save, skipped, timed = rows.amax(0)[
        : -len(times)
    ].tolist()
    if stopped:
        raise_everywhere(local.stopped)
    added = most_micro_batches * world - int(rows[:, 0].sum())
    sharing = world // data_parallel_size
    num_targets, encoder_tokens, images, truncated, *examples = (message[table.numel() :] // sharing).tolist()
    return Agreed(
        num_micro_batches=most_micro_batches,
        num_targets=num_targets,
        encoder_tokens=encoder_tokens,
        images=images,
        truncated=truncated,
        examples=examples,
        data_wait_s=data_wait / MICRO,
        memory_bytes=memory,
        stop=bool(stop),
        save=bool(save),
        skipped=_gather_skipped(local.skipped, world, data_parallel_size) if skipped else {},
        times=[RankTimes(*(each / MICRO for each in row[-len(times) :])) for row in rows.tolist()] if timed else [],
        positions=(int(rows[:, 1].sum()) + added * empty_positions) // sharing,
    )


def raise_everywhere(found: ReadingStopped | None) -> None:
    """Raise on every rank what the first rank that cannot read on has `found`; a collective."""
    for error in filter(None, gather([found])):
        error.alone = False
        raise error


def together(batches: Iterable[Item]) -> Iterator[Item]:
    """The batches, of which every rank has equally many; a collective at each.

    Raises ReadingStopped on every rank where reading raised it on one.
    """
    iterator = iter(batches)
    while True:
        batch, found = None, None
        try:
            batch = next(iterator, None)
        except ReadingStopped as error:
            found = error
        raise_everywhere(found)
        if batch is None:
            return
        yield batch


def _gather_skipped(skipped: dict[str, int], world: int, data_parallel_size: int) -> dict[str, int]:
    everywhere: list[Any] = [skipped]
    if world > 1:
        everywhere = [None] * world
        dist.all_gather_object(everywhere, skipped)
    total: dict[str, int] = {}
    for one in everywhere:
        for cause, count in one.items():
            total[cause] = total.get(cause, 0) + count
    return {cause: count // (world // data_parallel_size) for cause, count in sorted(total.items())}


def gather(items: list[Any]) -> list[Any]:
    """The items of all ranks in order of rank, on every rank."""
    if not dist.is_initialized():
        return items
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, items)
    return [item for one in everywhere for item in one]
