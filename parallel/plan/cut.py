"""Cut the list of units into pipeline stages: the slowest stage as fast as possible, with memory as a bound."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from rich.table import Table

from common.errors import ConfigurationError
from model.costs import UnitCost
from parallel.plan.memory import MemoryModel


@dataclass(frozen=True)
class StageCost:
    """Hold what one stage costs per micro-batch; `memory_bytes` is predicted, for all stages of its rank."""

    units: tuple[str, ...]
    parameters: int
    flops: float
    memory_bytes: float


def cut(costs: Sequence[UnitCost], memory: MemoryModel) -> list[StageCost]:
    """Return the stages, first to last: cut at `parallel.cut`, else by dynamic programming over training FLOPs.

    A frozen unit below everything trained costs its forward pass only. Raises ConfigurationError for more stages than
    units, for a cut at a name that is no unit, and where `parallel.memory_gib` is exceeded on some rank: by the given
    cut, or by every cut.
    """
    parallel = memory.parallel
    number = parallel.pipeline * parallel.virtual_stages
    if number > len(costs):
        raise ConfigurationError(
            f"parallel.pipeline={parallel.pipeline} x parallel.virtual_stages={parallel.virtual_stages} are more "
            f"stages than the model's {len(costs)} units; choose at most {len(costs)}."
        )
    starts = _named(costs, parallel.cut, number) if parallel.cut else _balanced(costs, memory)
    stages = [costs[first:end] for first, end in zip(starts, [*starts[1:], len(costs)], strict=True)]
    ranks = [memory.rank_bytes(stages[rank :: parallel.pipeline], rank) for rank in range(parallel.pipeline)]
    if parallel.cut and parallel.memory_gib and max(ranks) > parallel.memory_gib * 2**30:
        raise ConfigurationError(
            f"parallel.cut={list(parallel.cut)} gives pipeline rank {ranks.index(max(ranks))} stages that take "
            f"{max(ranks) / 2**30:.2f} GiB, more than parallel.memory_gib={parallel.memory_gib} GiB; move units to "
            "another stage, or leave parallel.cut out."
        )
    return [_stage(stage, ranks[index % parallel.pipeline]) for index, stage in enumerate(stages)]


def _named(costs: Sequence[UnitCost], names: Sequence[str], number: int) -> list[int]:
    index = {cost.name: i for i, cost in enumerate(costs)}
    for name in names:
        if name not in index:
            raise ConfigurationError(f"parallel.cut names {name!r}, which is no unit; units are {', '.join(index)}.")
    starts = [0, *sorted(index[name] for name in set(names))]
    if len(starts) != number or 0 in starts[1:]:
        raise ConfigurationError(
            f"parallel.cut={list(names)} makes {len(set(starts))} stages, not {number}; name the first unit of every "
            "stage but the first."
        )
    return starts


def _balanced(costs: Sequence[UnitCost], memory: MemoryModel) -> list[int]:
    """Return where stages start so that the largest time is least; among equals, the largest memory is least.

    With several stages on a rank, each may take an equal share of `parallel.memory_gib`.
    """
    parallel = memory.parallel
    number = parallel.pipeline * parallel.virtual_stages
    flops = [0.0, *accumulate(cost.training_flops for cost in costs)]
    stored = [0.0, *accumulate(map(memory.stored, costs))]
    kept = [0.0, *accumulate(map(memory.kept_once, costs))]
    decoder = [i for i, cost in enumerate(costs) if memory.encoder_bytes([cost])]
    shared = memory.encoder_bytes(costs)
    in_flight = [memory.in_flight(stage) for stage in range(number)]
    limit = parallel.memory_gib * 2**30 / parallel.virtual_stages if parallel.memory_gib else float("inf")

    def price(stage: int, first: int, end: int) -> tuple[float, float]:
        whole = shared if decoder and first <= decoder[-1] and end > decoder[0] else 0.0
        needed = stored[end] - stored[first] + in_flight[stage] * (kept[end] - kept[first] + whole)
        return (flops[end] - flops[first], needed) if needed <= limit else (float("inf"), float("inf"))

    @cache
    def best(stage: int, first: int) -> tuple[tuple[float, float], int]:
        """Return ((largest time, largest memory) of this stage and those after it, where the next one starts)."""
        if stage == number - 1:
            return price(stage, first, len(costs)), len(costs)
        choices = []
        for end in range(first + 1, len(costs) - (number - stage - 1) + 1):
            mine, rest = price(stage, first, end), best(stage + 1, end)[0]
            choices.append(((max(mine[0], rest[0]), max(mine[1], rest[1])), end))
        return min(choices)

    if best(0, 0)[0][0] == float("inf"):
        raise ConfigurationError(
            f"No cut into {number} stages keeps every rank within parallel.memory_gib={parallel.memory_gib} GiB; take "
            "more stages, tensor parallelism, a higher ZeRO stage or recompute."
        )
    starts = [0]
    for stage in range(number - 1):
        starts.append(best(stage, starts[-1])[1])
    return starts


def _stage(costs: Sequence[UnitCost], memory_bytes: float) -> StageCost:
    return StageCost(
        units=tuple(cost.name for cost in costs),
        parameters=sum(cost.cost.parameters for cost in costs),
        flops=sum(cost.training_flops for cost in costs),
        memory_bytes=memory_bytes,
    )


def table(stages: Sequence[StageCost]) -> Table:
    """Make a table of stages: units, parameters, TFLOP per micro-batch, predicted memory."""
    shown = Table(title="pipeline stages (TFLOP of one micro-batch; predicted memory of a rank with all of its stages)")
    for name in ("stage", "units", "parameters", "TFLOP", "share", "memory"):
        shown.add_column(name, justify="left" if name == "units" else "right", no_wrap=name != "units")
    total = sum(stage.flops for stage in stages)
    for number, stage in enumerate(stages):
        first, last = stage.units[0], stage.units[-1]
        shown.add_row(
            str(number),
            first if first == last else f"{first} .. {last} ({len(stage.units)})",
            f"{stage.parameters / 1e6:,.1f} M",
            f"{stage.flops / 1e12:.4f}",
            f"{stage.flops / total:.0%}",
            f"{stage.memory_bytes / 2**30:.2f} GiB",
        )
    return shown
