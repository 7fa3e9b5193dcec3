"""The cut that dynamic programming finds is the best of all cuts."""

from dataclasses import replace
from itertools import combinations

import pytest

from common.errors import ConfigurationError
from model.config import MT5Config
from model.costs import BatchShape, UnitCost, unit_costs
from model.describe import one_example, read_model
from model.pali import plan_on_meta
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.plan.cut import cut
from parallel.plan.memory import MemoryModel, StepShape


def costs(*frozen: str) -> list[UnitCost]:
    """The toy's units, as they are priced at 224 pixels."""
    config, _ = read_model(["phases=full_224"])
    return list(unit_costs(plan_on_meta(config, frozen).units(), one_example(config, 64, 32)))


def memory(**parallel: object) -> MemoryModel:
    step = StepShape(one_example(read_model(["phases=full_224"])[0], 64, 32), num_micro_batches=8)
    return MemoryModel(ParallelConfig(**parallel), OptimizerConfig(), step, data_parallel_size=1)  # type: ignore[arg-type]


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


@pytest.mark.parametrize("virtual_stages", [1, 2])
def test_every_limit_of_memory_is_kept_or_refused(virtual_stages: int) -> None:
    """The cut is the fastest of all whose stages take no more than an equal share of the limit each; long rows."""
    shape = BatchShape(images=64, vision_tokens=256, rows=64, encoder_tokens=512, decoder_tokens=64)
    config = replace(read_model(["phases=full_224"])[0], mt5=MT5Config(vocab_size=1024))
    priced = list(unit_costs(plan_on_meta(config).units(), shape))
    options = {"pipeline": 2, "virtual_stages": virtual_stages, "zero_stage": 1}
    free = replace(memory(**options), step=StepShape(shape, num_micro_batches=8))
    stored, kept = [free.stored(unit) for unit in priced], [free.kept_once(unit) for unit in priced]

    def largest(starts: tuple[int, ...]) -> float:
        spans = enumerate(zip(starts, [*starts[1:], len(priced)], strict=True))
        return max(sum(stored[a:b]) + free.in_flight(stage) * sum(kept[a:b]) for stage, (a, b) in spans)

    every = [(0, *starts) for starts in combinations(range(1, len(priced)), 2 * virtual_stages - 1)]
    prices = [(slowest(priced, starts), largest(starts)) for starts in every]
    fastest, unbounded = min(prices)
    outcomes = set()
    for share in (0.5, 0.8, 0.9, 0.99, 1.01):
        limit = share * unbounded
        bounded = replace(free, parallel=replace(free.parallel, memory_gib=virtual_stages * limit / 2**30))
        best = min((flops for flops, most in prices if most <= limit), default=None)
        outcomes.add("refused" if best is None else "fastest" if best == fastest else "slower")
        if best is None:
            with pytest.raises(ConfigurationError, match=r"keeps every rank within parallel\.memory_gib="):
                cut(priced, bounded)
            continue
        found = cut(priced, bounded)
        assert max(stage.flops for stage in found) == pytest.approx(best, rel=1e-12)
        assert max(stage.memory_bytes for stage in found) <= virtual_stages * limit
    assert outcomes == {"refused", "slower", "fastest"}


def test_as_many_stages_as_units() -> None:
    priced = costs()
    assert [stage.units for stage in cut(priced, memory(pipeline=len(priced)))] == [(unit.name,) for unit in priced]
    with pytest.raises(ConfigurationError, match=f"more stages than the model's {len(priced)} units; choose at most"):
        cut(priced, memory(pipeline=len(priced) + 1))


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


def test_a_cut_by_hand_names_the_first_unit_of_every_stage_but_the_first() -> None:
    priced = costs()
    first, second, *_, last = [unit.name for unit in priced]
    found = cut(priced, memory(pipeline=3, cut=[last, second]))
    assert [stage.units for stage in found] == [(first,), tuple(unit.name for unit in priced[1:-1]), (last,)]
    for names in ([first, last], [last, last]):
        with pytest.raises(ConfigurationError, match=r"makes 2 stages, not 3; name the first unit of every stage but"):
            cut(priced, memory(pipeline=3, cut=names))
    with pytest.raises(ConfigurationError, match=r"names 'nowhere', which is no unit; units are patches, "):
        cut(priced, memory(pipeline=2, cut=["nowhere"]))


def test_a_cut_by_hand_keeps_the_limit_of_memory_or_is_refused() -> None:
    priced = costs()
    free = cut(priced, memory(pipeline=2, cut=[priced[1].name]))
    most = max(stage.memory_bytes for stage in free)
    assert most == free[1].memory_bytes
    assert cut(priced, memory(pipeline=2, cut=[priced[1].name], memory_gib=most / 2**30)) == free
    with pytest.raises(ConfigurationError, match=r"gives pipeline rank 1 stages that take .* GiB; move units to"):
        cut(priced, memory(pipeline=2, cut=[priced[1].name], memory_gib=0.999 * most / 2**30))
