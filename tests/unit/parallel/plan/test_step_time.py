"""A step by cause, counted by hand on a tiny model; and bounds that no played schedule beats."""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import pytest

from model.costs import BatchShape, unit_costs
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.plan.actions import Pipeline
from parallel.plan.hardware import Hardware
from parallel.plan.memory import StepShape
from parallel.plan.play import StageTime
from parallel.plan.recompute import mark_recomputed
from parallel.plan.step_time import STACKS, StepModel, StepTime, balanced
from parallel.plan.unit_info import unit_infos
from tests.unit.parallel.plan.tiny import SHAPE, VIT, only, units

TRAINED = 1296 + 1760 + 16 + 2544 + 1040  # under a frozen ViT; of the bridge's 1,312, its norm's 16 are frozen too


def step_model(
    hardware: Hardware, *, number: int = 3, data: int = 1, frozen: Sequence[str] = VIT, name: str = "adamw",
    scale: int = 1, shape: BatchShape = SHAPE, **options: Any,
) -> StepModel:  # fmt: skip
    """`scale`: times the parameters that the model has, all divided by tensor-parallel ranks."""
    parallel = ParallelConfig(**options)
    marked = [(unit, copy(module)) for unit, module in units(frozen).items()]
    mark_recomputed(marked, parallel)
    infos = [
        replace(
            info, elements=scale * info.elements, trained_elements=scale * info.trained_elements, copied=0,
            copied_trained=0,
        )
        for info in unit_infos(marked, OptimizerConfig(name))
    ]  # fmt: skip
    step = StepShape(shape, number)
    return StepModel(
        hardware, parallel, OptimizerConfig(name), step, data, list(unit_costs(marked, shape)), infos, fused=True
    )


def test_a_step_of_one_rank_is_its_passes_its_update_and_the_host() -> None:
    """Arithmetic alone: three passes of a trained unit's FLOPs for each of 3 micro-batches, one of a frozen unit's."""
    model = step_model(only(flops=1.0, host_ms=7000.0))
    forward = {name: unit.cost(SHAPE).flops for name, unit in units().items()}
    attention = {"encoder_block_0": 4 * 3 * 121 * 12, "decoder_block_0": 4 * 3 * (49 + 77) * 12}
    half = {name: flops / 2 for name, flops in attention.items()}  # a fused backward pass takes 2.5 times the forward
    time = model.time([0])
    expected = {
        "vit": 3 * (forward["patches"] + forward["vit_block_0"]),
        "bridge": 3 * 3 * forward["bridge"],
        "encoder": 3 * (3 * forward["encoder_block_0"] + half["encoder_block_0"]),
        "decoder": 3 * (3 * forward["decoder_block_0"] + half["decoder_block_0"]),
        "head": 3 * 3 * forward["head"],
    }
    expected |= dict.fromkeys({*STACKS} - {*expected}, 0.0)  # of a tower alone
    assert time.compute_s == pytest.approx(expected)
    rest = (time.recompute_s, time.bubble_s, time.tensor_s, time.gather_s, time.reduce_s, time.update_s)
    assert rest == pytest.approx((0,) * 6) and time.host_s == 7
    assert time.seconds == pytest.approx(sum(expected.values()) + 7) == pytest.approx(model.lower_bound_s([0]))
    again = step_model(only(flops=1.0), recompute="block").time([0])
    assert again.recompute_s == pytest.approx(3 * (forward["encoder_block_0"] + forward["decoder_block_0"]))
    assert sum(again.compute_s.values()) == pytest.approx(sum(expected.values()) + again.recompute_s)
    stage = step_model(only(flops=1.0), recompute="attention").time([0])
    assert stage.recompute_s == 0 and stage.compute_s == pytest.approx(expected)


def test_the_parts_of_a_step_have_the_words_of_tables() -> None:
    time = StepTime({"vit": 6.0, "head": 2.0}, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
    assert time.parts() == {
        "compute vit": 4.5, "compute head": 1.5, "recomputation": 2.0, "bubble": 3.0, "tensor-parallel messages": 4.0,
        "gathering parameters": 5.0, "summing gradients": 6.0, "update": 7.0, "host": 8.0,
    }  # fmt: skip
    assert time.seconds == sum(time.parts().values()) == 41.0 and time.communication_s == 15.0
    idle = StepTime({"vit": 0.0}, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert idle.parts()["compute vit"] == 0.0 and idle.seconds == 3.0


ZERO = {  # options: bytes that each of two replicas sends, in a micro-batch (forward, backward) and after all
    (0,): ((0, 0), (0, 4 * TRAINED)),
    (0, "bf16"): ((0, 0), (0, 2 * TRAINED)),
    (1,): ((0, 0), (2 * TRAINED / 2, 4 * TRAINED / 2)),
    (2,): ((0, 0), (2 * TRAINED / 2, 4 * TRAINED / 2)),
    (2, "micro_batch"): ((0, 4 * TRAINED / 2), (2 * TRAINED / 2, 0)),
    (2, "bf16"): ((0, 0), (2 * TRAINED / 2, 2 * TRAINED / 2)),
    (3,): ((2 * TRAINED / 2, 0), (0, 4 * TRAINED / 2)),
    (3, "micro_batch"): ((2 * TRAINED / 2, 4 * TRAINED / 2), (0, 0)),
    (3, "step"): ((0, 0), (2 * TRAINED / 2, 4 * TRAINED / 2)),
    (3, "step", "frozen"): ((0, 0), (2 * 7544 / 2, 4 * TRAINED / 2)),
}


@pytest.mark.parametrize("options", ZERO, ids=str)
@pytest.mark.parametrize("tensor", [1, 2])
def test_bytes_between_replicas(options: tuple[Any, ...], tensor: int) -> None:
    """All-reduce sends the whole, gather and scatter a half of it; tensor-parallel ranks have a half of each matrix."""
    named = {"zero_stage": options[0], "reduce_dtype": "bf16" if "bf16" in options else "fp32",
             "gather": "step" if "step" in options else "micro_batch", "tensor": tensor,
             "reduce": "micro_batch" if "micro_batch" in options else "step",
             "shard_frozen": "frozen" in options}  # fmt: skip
    tiny = BatchShape(0, 4, 0, 0, 0)  # no rows -> tensor-parallel messages are empty
    model = step_model(only(node=1.0), data=2, shape=tiny, **named)
    (forward, backward), (gather, reduce) = ZERO[options]
    (stage,) = model.stage_times([0])
    assert (stage.forward_s, stage.backward_s) == pytest.approx((forward / tensor, backward / tensor))
    assert model.after_passes([0]) == pytest.approx((gather / tensor, reduce / tensor, 0))
    time = model.time([0])
    assert time.gather_s == pytest.approx((3 * forward + gather) / tensor)
    assert time.reduce_s == pytest.approx((3 * backward + reduce) / tensor)
    assert time.seconds == pytest.approx(time.gather_s + time.reduce_s)
    hidden = 0 if options[0] == 0 or "micro_batch" in options else reduce / tensor  # at best, by a backward pass
    assert model.lower_bound_s([0]) == pytest.approx(time.seconds - hidden)
    alone = step_model(only(node=1.0), shape=tiny, **named)
    assert alone.time([0]).seconds == 0


def test_zero_3_gathers_anew_for_a_backward_pass_that_does_not_follow_at_once() -> None:
    """In the last stage it follows at once, while up to 1e9 gathered elements stay; a frozen tower has none."""
    tiny = BatchShape(0, 4, 0, 0, 0)
    options = {"zero_stage": 3, "data": 2, "shape": tiny, "pipeline": 2, "reduce": "micro_batch"}
    first, last = step_model(only(node=1.0), **options).stage_times([0, 4])
    assert (first.forward_s, first.backward_s) == pytest.approx((1296 + 1760, 1296 + 1760 + 2 * 3056))
    assert (last.forward_s, last.backward_s) == pytest.approx((16 + 2544 + 1040, 2 * 3600))
    whole = step_model(only(node=1.0), **options, shard_frozen=True).stage_times([0, 4])[0]
    assert (whole.forward_s, whole.backward_s) == pytest.approx((3944, 1312 + 1760 + 2 * 3056))  # none of the ViT's
    million = 10**6
    (one,) = step_model(only(node=1.0), **options | {"pipeline": 1}, scale=million).stage_times([0])
    assert one.backward_s == pytest.approx(million * (TRAINED + 2 * TRAINED))
    for scale, again in ((10**9 // 6656, 0), (10**9 // 3600, 3056), (10**9 // 3600 + 1, 3072)):
        (one,) = step_model(only(node=1.0), **options | {"pipeline": 1}, scale=scale).stage_times([0])
        assert one.backward_s == pytest.approx(scale * (again + 2 * TRAINED))


@pytest.mark.parametrize(("zero_stage", "share"), [(0, 1), (1, 2), (3, 2)])
def test_an_update_moves_its_elements_and_launches_its_kernels(zero_stage: int, share: int) -> None:
    options = {"zero_stage": zero_stage, "data": 2}
    for name, moved, kernels in (("adamw", 72 + 26, 2), ("adafactor", 100 + 26, 1)):
        update = step_model(only(memory=1.0), name=name, **options).after_passes([0])[2]
        assert update == pytest.approx(moved * TRAINED / share)
        halved = step_model(only(memory=1.0), name=name, tensor=2, **options).after_passes([0])[2]
        assert halved == pytest.approx(moved * TRAINED / share / 2)
        launched = step_model(only(launch_s=1.0), name=name, **options).after_passes([0])[2]
        assert launched == pytest.approx(kernels * (7 + 9 + 1 + 14 + 2))
        sums = step_model(only(node=1.0), name=name, **options).after_passes([0])[2]
        numbers = 2 * (5 + 9 + 1 + 14 + 2)  # of each tensor; all are too small to be factored
        assert sums == (0 if name == "adamw" or not zero_stage else pytest.approx(4 * numbers))


def test_the_rank_that_takes_longest_after_the_passes_counts() -> None:
    model = step_model(only(memory=1.0), pipeline=2)
    for starts in ([0, 3], [0, 5]):
        parts = [sum((0, 0, 1296, 1760, 16, 2544, 1040)[a:b]) for a, b in ((0, starts[1]), (starts[1], 7))]
        assert model.after_passes(starts)[2] == pytest.approx(98 * max(parts))
    interleaved = step_model(only(memory=1.0), pipeline=2, virtual_stages=2)
    assert interleaved.after_passes([0, 3, 4, 5])[2] == pytest.approx(98 * (1760 + 2544 + 1040))


@pytest.mark.parametrize(("options", "share"), [({}, 1), ({"tensor": 2}, 1), ({"tensor": 2, "sequence": True}, 2)])
def test_messages_between_stages(options: dict[str, Any], share: int) -> None:
    """What a unit hands on: 8 visual tokens of width 8, later 54 of width 16, in 2 bytes; no frozen unit's gradient."""
    links = only(node=1.0, devices_per_node=16)
    stages = step_model(links, pipeline=7, **options).stage_times(range(7))
    vision, text = 2 * 8 * 8 / share, 2 * 54 * 16 / share
    assert [stage.activations_s for stage in stages] == pytest.approx([0, vision, vision, *[text] * 4])
    assert [stage.gradients_s for stage in stages] == pytest.approx([0, 0, *[text] * 4, 0])
    trained = step_model(links, pipeline=7, frozen=(), **options).stage_times(range(7))
    assert [stage.gradients_s for stage in trained] == pytest.approx([vision, vision, *[text] * 4, 0])


@pytest.mark.parametrize(("sequence", "forward", "backward"), [(False, 0, 1056), (True, 528, 528)])
def test_decoder_blocks_of_a_stage_share_the_messages_of_the_encoders_output(
    sequence: bool, forward: float, backward: float
) -> None:
    """33 positions of width 16 in 2 bytes: gathered in shards and scattered, or only their gradient summed."""
    model = step_model(only(node=1.0), tensor=2, sequence=sequence, pipeline=2)
    for starts, with_decoder in (([0, 5], 1), ([0, 6], 0)):
        for number, stage in enumerate(model.stage_times(starts)):
            times = model.unit_times[slice(*[*starts, 7][number : number + 2])]
            more = number == with_decoder
            assert stage.forward_s == pytest.approx(sum(time.forward.total_s for time in times) + more * forward)
            assert stage.backward_s == pytest.approx(sum(time.backward.total_s for time in times) + more * backward)
    below = step_model(only(node=1.0), tensor=2, frozen=(*VIT, "bridge.*", "encoder_*"))
    assert below.encoder_output(0, 7).backward.total_s == 0  # nothing below takes the gradient


def test_stages_lie_on_nodes_as_ranks_are_numbered() -> None:
    within = step_model(only(network=1.0), pipeline=2, data=4).stage_times([0, 3])[1]
    between = step_model(only(network=1.0), pipeline=2, data=8).stage_times([0, 3])[1]
    assert within.activations_s == 0 and between.activations_s == pytest.approx(2 * 54 * 16)


def test_one_micro_batch_passes_through_all_stages_and_back() -> None:
    """Nothing overlaps: a step is every pass and every message, which is the bound too."""
    hardware = only(flops=1e3, node=10.0, host_ms=2000.0)
    for starts in ([0, 3, 5], [0, 1, 6], [0, 2, 3]):
        model = step_model(hardware, number=1, pipeline=3)
        stages = model.stage_times(starts)
        whole = sum(stage.total_s + stage.activations_s + stage.gradients_s for stage in stages)
        time = model.time(starts)
        assert time.seconds == pytest.approx(whole + 2) == pytest.approx(model.lower_bound_s(starts))
        busiest = max(stages, key=lambda stage: stage.total_s)
        assert sum(time.compute_s.values()) == pytest.approx(busiest.total_s)
        assert time.bubble_s == pytest.approx(whole - busiest.total_s)


@pytest.mark.parametrize(
    "options", [{"pipeline": 2}, {"pipeline": 3, "tensor": 2}, {"pipeline": 2, "virtual_stages": 2}]
)
@pytest.mark.parametrize("number", [2, 5])
def test_no_schedule_beats_the_bound(options: dict[str, int], number: int) -> None:
    hardware = only(flops=1e3, node=10.0, host_ms=2000.0)
    model = step_model(hardware, number=number, zero_stage=3, reduce="micro_batch", data=2,
                       recompute="block", **options)  # fmt: skip
    starts = model.starts()
    stages, p = model.stage_times(starts), model.parallel.pipeline
    time, bound = model.time(starts), model.lower_bound_s(starts)
    busiest = max(sum(stage.total_s for stage in stages[rank::p]) for rank in range(p))
    runs = number + number % 2 * (p == 2 and len(stages) == 4)  # an interleaved schedule takes multiples of the ranks
    hidden = model.stage_times(starts, least=True)  # work hides as many messages as it can
    least = runs * max(sum(stage.total_s for stage in hidden[rank::p]) for rank in range(p))
    assert least + sum(model.after_passes(starts, least=True)) + 2 <= bound <= time.seconds
    assert all(one.total_s <= other.total_s for one, other in zip(hidden, stages, strict=True))
    assert time.seconds == pytest.approx(sum(model.after_passes(starts)) + 2 + model.timeline(starts).seconds)
    assert sum(time.parts().values()) == pytest.approx(time.seconds)
    passes = time.seconds - time.bubble_s - sum(model.after_passes(starts)) - 2
    assert passes == pytest.approx(runs * busiest)


def test_a_bubble_of_three_stages_by_hand() -> None:
    """Fill and drain: (p - 1) passes of the slowest stage beside its own; the middle stage computes longest."""
    model = step_model(only(), number=4, pipeline=3)
    passes = [StageTime(1.0, 2.0), StageTime(1.0, 3.0), StageTime(1.0, 2.0)]
    object.__setattr__(model, "stage_times", lambda starts, least=False: passes)
    assert model.lower_bound_s([0, 2, 4]) == pytest.approx(3 + 4 * 4)
    assert model.timeline([0, 2, 4]).seconds >= 19
    assert model.timeline([0, 2, 4], micro_batches=1).seconds == pytest.approx(10)
    assert model.pipeline == Pipeline(3, 1, 4, "1f1b")


def test_a_cut_balances_seconds_and_is_made_once() -> None:
    model = step_model(only(flops=1.0), pipeline=2, virtual_stages=2)
    seconds = [time.total_s for time in model.unit_times]
    assert model.starts() == balanced(seconds, 4) and model.starts() is model.starts()
    shared = replace(model, parallel=replace(model.parallel, pipeline=3, virtual_stages=1))
    assert shared.times is model.times and shared.starts() == balanced(seconds, 3)
    # What the times depend on takes part in the key under which they are kept.
    for change in (
        {"parallel": replace(model.parallel, tensor=2)},
        {"parallel": replace(model.parallel, tensor=2, sequence=True)},
        {"step": StepShape(replace(SHAPE, rows=4), 3)},
    ):
        assert replace(model, **change).unit_times != model.unit_times  # type: ignore[arg-type]


def test_a_cut_leaves_a_unit_for_every_stage() -> None:
    assert balanced([1.0, 1.0, 9.0], 3) == [0, 1, 2]
    assert balanced([9.0, 1.0, 1.0, 1.0], 2) == [0, 1]
    assert balanced([1.0, 1.0, 1.0, 9.0], 2) == [0, 3]
    assert balanced([2.0, 2.0, 2.0, 2.0], 2) == [0, 2]
    assert balanced([0.0, 0.0, 5.0], 2) == [0, 2] or balanced([0.0, 0.0, 5.0], 2) == [0, 1]
