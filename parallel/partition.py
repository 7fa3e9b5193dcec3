"""Where to cut the list of units into pipeline stages: the slowest stage as fast as possible, memory as a bound."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from rich.table import Table

from errors import ConfigurationError
from model.costs import UnitCost
from parallel.config import ParallelConfig

BYTES_OF_FROZEN = 2  # a 16-bit parameter
BYTES_OF_TRAINED = 12  # a 16-bit parameter, fp32 weight and gradient, and a factored optimizer's next to nothing


@dataclass(frozen=True)
class StageCost:
    """What one stage costs per micro-batch; bytes before tensor parallelism and ZeRO divide them."""

    units: tuple[str, ...]
    parameters: int
    flops: float
    parameter_bytes: float
    kept_bytes: float  # activations of one micro-batch


def cut(costs: Sequence[UnitCost], parallel: ParallelConfig, data_parallel_size: int = 1) -> list[StageCost]:
    """The stages, first to last: as `parallel.cut` says, else by dynamic programming over the units' training FLOPs.

    A frozen unit below everything trained costs its forward pass only. Raises ConfigurationError for more stages than
    units, for a cut that names no unit, and where no cut keeps every stage within `parallel.memory_gib`.
    """
    number = parallel.pipeline * parallel.virtual_stages
    if number > len(costs):
        raise ConfigurationError(
            f"parallel.pipeline={parallel.pipeline} x parallel.virtual_stages={parallel.virtual_stages} are more "
            f"stages than the model's {len(costs)} units; choose at most {len(costs)}."
        )
    starts = _named(costs, parallel.cut, number) if parallel.cut else _balanced(costs, parallel, data_parallel_size)
    ends = [*starts[1:], len(costs)]
    return [_stage(costs[first:end]) for first, end in zip(starts, ends, strict=True)]


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


def _balanced(costs: Sequence[UnitCost], parallel: ParallelConfig, data_parallel_size: int) -> list[int]:
    """First units of the stages whose largest time is least; among equals, of least largest memory."""
    number = parallel.pipeline * parallel.virtual_stages
    flops = [0.0, *accumulate(cost.training_flops for cost in costs)]
    stored = [0.0, *accumulate(_parameter_bytes(cost) for cost in costs)]
    kept = [0.0, *accumulate(cost.kept_bytes for cost in costs)]
    limit = parallel.memory_gib * 2**30 if parallel.memory_gib else float("inf")

    def price(stage: int, first: int, end: int) -> tuple[float, float]:
        memory = resident_bytes(
            stored[end] - stored[first], kept[end] - kept[first], stage, parallel, data_parallel_size
        )
        return (flops[end] - flops[first], memory) if memory <= limit else (float("inf"), float("inf"))

    @cache
    def best(stage: int, first: int) -> tuple[tuple[float, float], int]:
        """((largest time, largest memory) of this stage and those after it, where the next one starts)."""
        if stage == number - 1:
            return price(stage, first, len(costs)), len(costs)
        choices = []
        for end in range(first + 1, len(costs) - (number - stage - 1) + 1):
            mine, rest = price(stage, first, end), best(stage + 1, end)[0]
            choices.append(((max(mine[0], rest[0]), max(mine[1], rest[1])), end))
        return min(choices)

    if best(0, 0)[0][0] == float("inf"):
        raise ConfigurationError(
            f"No cut into {number} stages keeps every stage within parallel.memory_gib={parallel.memory_gib} GiB; take "
            "more stages, tensor parallelism, a higher ZeRO stage or recompute."
        )
    starts = [0]
    for stage in range(number - 1):
        starts.append(best(stage, starts[-1])[1])
    return starts


def _parameter_bytes(cost: UnitCost) -> float:
    return cost.cost.parameters * (BYTES_OF_TRAINED if cost.trained else BYTES_OF_FROZEN)


def resident_bytes(stored: float, kept: float, stage: int, parallel: ParallelConfig, data_parallel_size: int) -> float:
    """Predicted bytes on one rank of a stage: parameters and their states, activations of the micro-batches in flight.

    Under 1F1B stage s of p holds p - s micro-batches. ZeRO-3 divides all parameter bytes by the data-parallel size,
    ZeRO-1 and 2 about two thirds and five sixths of them.
    """
    sharded = {0: 0.0, 1: 2 / 3, 2: 5 / 6, 3: 1.0}[parallel.zero_stage]
    stored *= 1 - sharded + sharded / data_parallel_size
    in_flight = parallel.pipeline * parallel.virtual_stages - stage
    return (stored + kept * parallel.micro_batch * in_flight) / parallel.tensor


def _stage(costs: Sequence[UnitCost]) -> StageCost:
    return StageCost(
        units=tuple(cost.name for cost in costs),
        parameters=sum(cost.cost.parameters for cost in costs),
        flops=sum(cost.training_flops for cost in costs),
        parameter_bytes=sum(map(_parameter_bytes, costs)),
        kept_bytes=sum(cost.kept_bytes for cost in costs),
    )


def table(stages: Sequence[StageCost], parallel: ParallelConfig, data_parallel_size: int) -> Table:
    """The cut as people read it: stage, units, parameters, TFLOP per example, predicted memory."""
    shown = Table(title="pipeline stages (one example a row; memory per rank, predicted)")
    for name in ("stage", "units", "parameters", "TFLOP", "share", "memory"):
        shown.add_column(name, justify="left" if name == "units" else "right", no_wrap=name != "units")
    total = sum(stage.flops for stage in stages)
    for number, stage in enumerate(stages):
        memory = resident_bytes(stage.parameter_bytes, stage.kept_bytes, number, parallel, data_parallel_size)
        first, last = stage.units[0], stage.units[-1]
        shown.add_row(
            str(number),
            first if first == last else f"{first} .. {last} ({len(stage.units)})",
            f"{stage.parameters / 1e6:,.1f} M",
            f"{stage.flops / 1e12:.4f}",
            f"{stage.flops / total:.0%}",
            f"{memory / 2**30:.2f} GiB",
        )
    return shown
