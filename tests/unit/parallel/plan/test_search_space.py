"""The layouts that a search tries, on a tiny model: divisions, options, limits, FLOPs and several phases."""

from dataclasses import replace

import pytest

from model.costs import BatchShape
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.plan.hardware import GIB
from parallel.plan.memory import MemoryModel, StepShape
from parallel.plan.peak import Peak, PeakModel
from parallel.plan.search import Choice, Search, smallest
from tests.unit.parallel.plan.tiny import FROZEN, H100, LONGER, ROWS, search, units


def divisions(own: Search) -> list[tuple[int, int, int, bool, int]]:
    return [(p.pipeline, p.virtual_stages, p.tensor, p.sequence, p.zero_stage) for p in own.degrees()]


ALONE = [(1, 1, 1, False, 0)]
TWO = [*((1, 1, 1, False, zero) for zero in (0, 1, 2, 3)), (1, 1, 2, True, 0), (1, 1, 2, False, 0),
       (2, 1, 1, False, 0), (2, 2, 1, False, 0)]  # fmt: skip


def test_divisions_are_those_of_the_ranks_simplest_first() -> None:
    """Two heads divide over two ranks at most; seven units make seven stages at most."""
    assert divisions(search(1)) == ALONE
    assert divisions(search(2)) == TWO
    eight = divisions(search(8))
    assert len(eight) == len(set(eight))
    assert set(eight) == {
        (pipeline, virtual, tensor, sequence, zero)
        for pipeline, virtual in ((1, 1), (2, 1), (2, 2), (4, 1))
        for tensor, sequence in ((1, False), (2, True), (2, False))
        for zero in (0, 1, 2, 3)
        if pipeline * tensor < 8 or not zero
    }


def test_replicas_divide_the_batch_and_the_streams() -> None:
    def replicas(own: Search) -> set[int]:
        return {config.data_parallel_size(own.gpus) for config in own.degrees()}

    assert replicas(search(8)) == {1, 2, 4, 8}
    assert replicas(search(8, num_streams=4)) == {1, 2, 4}
    assert replicas(search(8, FROZEN, replace(LONGER, rows=replace(ROWS, global_batch_size=4)))) == {1, 2, 4}
    assert divisions(search(7)) == []  # 24 examples do not divide over 7 ranks
    assert divisions(search(6)) and all(6 % (each[0] * each[2]) == 0 for each in divisions(search(6)))
    small = Search((FROZEN,), OptimizerConfig("adamw"), replace(H100, devices_per_node=1), 8)
    assert {config.tensor for config in small.degrees()} == {1}


def test_degrees_replace_those_of_the_settings() -> None:
    base = ParallelConfig(
        zero_stage=3,
        gather="step",
        reduce="micro_batch",
        cut=["bridge"],
        memory_gib=3.0,
        recompute="mlp",
        timeout_s=9.0,
    )
    for config in search(2, base=base).degrees():
        rest = (config.gather, config.reduce, config.cut, config.memory_gib, config.recompute, config.timeout_s)
        assert rest == ("micro_batch", "step", [], None, "none", 9.0)


@pytest.mark.parametrize(
    ("gpus", "images", "count"),
    [
        (1, 2, 4 * 3),  # 12 rows: micro-batches of 1, 2, 4, 8
        (1, 1, 5 * 3),  # 24 rows: 16 too
        (1, 5, 3 * 3),  # 4.8 rows, so 5
        (2, 2, 3 * 3 * 3 + 3 * 3 * 2 * 2 + 4 * 4 * 3),  # two replicas have 6 rows; ZeRO-3 gathers and sums in two ways
    ],
)
def test_every_option_is_played_once_where_all_fit(gpus: int, images: int, count: int) -> None:
    own = search(gpus, replace(FROZEN, rows=replace(ROWS, images_per_row=images)))
    found = own.run(most=1000, exhaustive=True)
    assert own.played == count and own.rejected == {}
    assert len(found) == len(list(own.degrees()))
    assert [choice.seconds for choice in found] == sorted(choice.seconds for choice in found)


def test_the_fastest_are_kept_below_a_limit() -> None:
    every = search(2).run(most=1000, exhaustive=True)
    seconds = [choice.seconds for choice in every]
    for most in (1, 3, 100):
        own = search(2)
        assert [choice.seconds for choice in own.run(most)] == pytest.approx(seconds[:most])
        assert own.played <= 93
    best, second = seconds[0], next(each for each in seconds if each > seconds[0])
    assert search(2).run(10, below_s=best) == []
    assert len(search(2).run(10, below_s=(best + second) / 2)) == seconds.count(best)
    assert len(search(2).run()) == len(seconds) == 8 and len(search(8).run()) == 10


def test_several_phases_share_their_degrees_and_add_up() -> None:
    own, exhaustive = search(4, FROZEN, LONGER), search(4, FROZEN, LONGER)
    found = own.run(most=2)
    every = exhaustive.run(most=1000, exhaustive=True)
    assert [choice.seconds for choice in found] == pytest.approx([choice.seconds for choice in every[:2]])
    for choice in every:
        first, second = choice.phases.values()
        assert list(choice.phases) == ["frozen", "longer"]
        assert choice.seconds == pytest.approx(3 * first.time.seconds + 5 * second.time.seconds)
        for name in ("tensor", "pipeline", "virtual_stages", "sequence", "zero_stage"):
            assert getattr(first.parallel, name) == getattr(second.parallel, name)
        assert choice.parallel is first.parallel
    endless = search(2, replace(FROZEN, steps=0)).run(most=1)
    assert endless[0].seconds == 0


def test_a_phase_that_fits_nowhere_leaves_no_layout_and_its_least_memory() -> None:
    small = replace(H100, memory_gib=1.6, overhead_gib=1.55)
    own = Search((FROZEN, LONGER), OptimizerConfig("adamw"), small, 1)
    assert own.run() == [] and set(own.rejected) == {"frozen"}  # the second phase is not tried any more
    least = min(max(peak.total for peak in own.peaks(*own.step_model(FROZEN, replace(own.base, micro_batch_size=micro,
                recompute=kind)))) for micro in (1, 2, 4, 8) for kind in ("none", "attention", "block"))  # fmt: skip
    assert own.rejected["frozen"] == least


def test_a_share_of_the_memory_may_be_filled() -> None:
    own = search(1)
    limit = H100.memory_gib * GIB * 0.97

    def peaks(*totals: float) -> list[Peak]:
        return [Peak(total, 0.0, 0.0, 0.0, 0.0, "update") for total in totals]

    assert own.fits(FROZEN, peaks(1.0, limit)) and own.rejected == {}
    assert not own.fits(FROZEN, peaks(1.0, limit + 9, 2.0)) and own.rejected == {"frozen": limit + 9}
    assert not own.fits(FROZEN, peaks(limit + 5)) and own.rejected == {"frozen": limit + 5}
    assert not own.fits(FROZEN, peaks(limit + 7)) and own.rejected == {"frozen": limit + 5}
    assert search(1, headroom=0.5).fits(FROZEN, peaks(limit / 1.94)) and not search(1, headroom=0.5).fits(
        FROZEN, peaks(limit)
    )


def test_a_step_has_the_rows_of_its_phase() -> None:
    parallel = ParallelConfig(tensor=2, micro_batch_size=2, recompute="block")
    own = search(4)
    model, starts = own.step_model(FROZEN, parallel)
    assert starts == [0] and model.data_parallel_size == 2
    assert model.step == StepShape(BatchShape(4, 4, 2, 12, 8, 2), 3)  # 24 examples: 2 replicas x 2 rows x 2 images x 3
    wide = own.step_model(FROZEN, replace(parallel, micro_batch_size=4))[0]
    assert wide.step.num_micro_batches == 2 and wide.step.micro_batch.rows == 4  # the second one is not full
    piped = own.step_model(FROZEN, replace(parallel, tensor=1, pipeline=4))
    assert len(piped[1]) == 4 and piped[1] == piped[0].starts()
    recompute = {cost.name: cost.unit.recompute for cost in model.costs}
    assert recompute["encoder_block_0"] == "block" and recompute["head"] == "none"
    plain = own.step_model(FROZEN, replace(parallel, recompute="none"))[0]
    assert {cost.unit.recompute for cost in plain.costs} == {"none"}
    assert search(4, element_bytes=4).step_model(FROZEN, parallel)[0].step.micro_batch.element_bytes == 4


@pytest.mark.parametrize(("fused", "on_gpu"), [(True, True), (False, True), (True, False)])
def test_peaks_are_those_of_the_model_of_memory(fused: bool, on_gpu: bool) -> None:
    own = search(4, fused=fused, on_gpu=on_gpu)
    model, starts = own.step_model(FROZEN, ParallelConfig(pipeline=2, zero_stage=2, micro_batch_size=2))
    memory = MemoryModel(model.parallel, own.optimizer, model.step, 2)
    expected = PeakModel(memory, H100, model.costs, model.infos, fused, on_gpu).peaks(starts)
    assert own.peaks(model, starts) == expected and model.fused == fused
    others = [PeakModel(memory, H100, model.costs, model.infos, f, g).peaks(starts) for f, g in
              {(True, True), (False, True), (True, False)} - {(fused, on_gpu)}]  # fmt: skip
    assert all(peaks != expected for peaks in others)


def test_utilization_is_arithmetic_without_recomputation_over_the_peak() -> None:
    own = search(2, replace(FROZEN, rows=replace(ROWS, global_batch_size=26)))
    (phase,) = own.phases
    forward = {name: unit.cost(BatchShape(2, 4, 1, 12, 8)).flops for name, unit in units().items()}
    row = sum(flops * (1 if name in ("patches", "vit_block_0") else 3) for name, flops in forward.items())
    assert own.step_flops(phase) == pytest.approx(13 * row)
    assert search(2, replace(phase, rows=replace(ROWS, global_batch_size=25))).step_flops(
        replace(phase, rows=replace(ROWS, global_batch_size=25))
    ) == pytest.approx(13 * row)
    for choice in own.run():
        (one,) = choice.phases.values()
        assert one.mfu == pytest.approx(13 * row / (one.time.seconds * 2 * 989.4e12))
        assert one.cut == tuple(("patches", "vit_block_0", "bridge", "encoder_block_0", "encoder_norm",
                                 "decoder_block_0", "head")[start] for start in one.starts[1:])  # fmt: skip
        assert one.memory_bytes == max(peak.total for peak in one.peaks)
        assert len(one.peaks) == one.parallel.pipeline
    fp32 = search(2, replace(FROZEN, rows=ROWS), element_bytes=4)
    (one,) = fp32.run(most=1)[0].phases.values()
    assert one.mfu == pytest.approx(12 * row / (one.time.seconds * 2 * 66.9e12))


def test_the_smallest_number_of_devices_is_found_by_doubling() -> None:
    tried: list[int] = []

    def make(gpus: int) -> Search:
        """One replica takes a device each; from 12 devices on there is memory enough."""
        tried.append(gpus)
        own = search(1)
        own.headroom = 0.97 if gpus >= 12 else 0.0
        return own

    assert smallest(make, 3) == 12 and tried == [6, 12]
    assert smallest(make, 12) == 24
    tried.clear()
    assert smallest(lambda gpus: make(min(gpus, 2)), 1, most=8) is None and len(tried) == 3
    assert smallest(make, 8, most=8) is None and smallest(make, 7, most=8) == 14
    assert smallest(make, 8192) == 16384 and smallest(make, 16384) is None


def test_a_choice_of_no_phase_order() -> None:
    first, second = search(1).run(1)[0], search(1, LONGER).run(1)[0]
    both = Choice({**second.phases, **first.phases}, 1.0)
    assert both.parallel is second.parallel
