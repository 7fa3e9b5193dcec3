"""The cut that dynamic programming finds is the best of all cuts."""

from itertools import combinations

import pytest

from errors import ConfigurationError
from model.costs import UnitCost, costs_of
from model.describe import one_example, plan, read_sizes
from model.pali import freeze
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.memory import Memory, Work
from parallel.partition import cut


def costs(*frozen: str) -> list[UnitCost]:
    """The toy's units, as they are priced at 224 pixels."""
    sizes = read_sizes(["stage=full_224"])
    planned = plan(sizes)
    freeze(planned, frozen)
    return list(costs_of(planned.units(), one_example(sizes, 64, 32)))


def memory(**parallel: object) -> Memory:
    work = Work(one_example(read_sizes(["stage=full_224"]), 64, 32), num_micro_batches=8)
    return Memory(ParallelConfig(**parallel), OptimizerConfig(), work, data_parallel_size=1)  # type: ignore[arg-type]


def slowest(priced: list[UnitCost], starts: tuple[int, ...]) -> float:
    ends = [*starts[1:], len(priced)]
    return max(sum(unit.training_flops for unit in priced[a:b]) for a, b in zip(starts, ends, strict=True))


@pytest.mark.parametrize("frozen", [(), ("patches.*", "vit_block_*", "bridge.vit_norm.*")])
@pytest.mark.parametrize("number", [2, 3, 4])
def test_no_cut_has_a_faster_slowest_stage(number: int, frozen: tuple[str, ...]) -> None:
    priced = costs(*frozen)
    found = cut(priced, memory(pipeline=number))
    assert [name for stage in found for name in stage.units] == [unit.name for unit in priced]
    every = [slowest(priced, (0, *starts)) for starts in combinations(range(1, len(priced)), number - 1)]
    assert max(stage.flops for stage in found) == pytest.approx(min(every), rel=1e-12)


def test_frozen_units_cost_their_forward_pass_and_move_the_cut() -> None:
    trained, frozen = costs(), costs("patches.*", "vit_block_*", "bridge.vit_norm.*")
    vision = sum(unit.name.startswith(("patches", "vit_block")) for unit in trained)
    for before, after in zip(trained[:vision], frozen[:vision], strict=True):
        assert after.training_flops == pytest.approx(after.cost.flops)
        assert before.training_flops == pytest.approx(3 * before.cost.flops, rel=0.05)
    first = [len(cut(priced, memory(pipeline=2))[0].units) for priced in (trained, frozen)]
    assert first[1] > first[0]


def test_a_cut_by_hand_must_make_as_many_stages() -> None:
    with pytest.raises(ConfigurationError, match=r"makes 2 stages, not 3; name the first unit of every stage but"):
        cut(costs(), memory(pipeline=3, cut=["bridge"]))
