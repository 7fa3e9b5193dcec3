"""The fullest moment of a rank, counted by hand on a tiny model: which moment it is, and every term of it."""

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from model.costs import UnitCost, unit_costs
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.plan.actions import Pipeline
from parallel.plan.buckets import Sending, held_in_backward
from parallel.plan.hardware import GIB
from parallel.plan.memory import MemoryModel, StepShape
from parallel.plan.peak import Peak, PeakModel
from parallel.plan.play import kept_counts
from parallel.plan.recompute import mark_recomputed
from parallel.plan.unit_info import UnitInfo, unit_infos
from tests.unit.parallel.plan.tiny import SHAPE, UNITS, VIT, only, units

FORWARD_OF = {"patches": 2 * 64, "vit_block_0": 2 * 64 + 192, "encoder_block_0": 2 * 528 + 1320}
# Elements of a backward pass: three of the stream, two of the widest tensor between column and row maps; the head's
# are two of its stream.
BACKWARD_OF = {"bridge": 3 * 128, "encoder_block_0": 3 * 528 + 2 * 1320, "encoder_norm": 0,
               "decoder_block_0": 3 * 528 + 2 * 840, "head": 2 * 21 * 16}  # fmt: skip
LARGEST = {"bridge": 1024, "encoder_block_0": 640, "encoder_norm": 16, "decoder_block_0": 640, "head": 0}  # a parameter
TRAINED = {"bridge": 1296, "encoder_block_0": 1760, "encoder_norm": 16, "decoder_block_0": 2544, "head": 1040}
LOSS = 10 * 64 * (4 + 2) + 64 * 16 * 4  # bytes: logits of a chunk with their gradients, the fp32 sum over chunks
EVERY = tuple(range(7))  # each unit a stage
ADAMW = OptimizerConfig("adamw")
PAIR = ParallelConfig(tensor=2)


def model(
    *, number: int = 64, data: int = 1, element: int = 2, scale: float = 1, given: Mapping[str, UnitInfo] | None = None,
    fused: bool = True, on_gpu: bool = True, frozen: tuple[str, ...] = VIT, decoder_tokens: int = 7, **options: Any,
) -> PeakModel:  # fmt: skip
    """`scale`: times the parameters that the model has, all divided by tensor ranks; `given`: facts of units."""
    parallel = ParallelConfig(**options)
    marked = [(name, copy(unit)) for name, unit in units(frozen).items()]
    mark_recomputed(marked, parallel)
    shape = replace(SHAPE, element_bytes=element, decoder_tokens=decoder_tokens)
    infos = [
        replace(
            info, elements=int(scale * info.elements), trained_elements=int(scale * info.trained_elements),
            largest=int(scale * info.largest), copied=0, copied_trained=0,
        )
        for info in unit_infos(marked, ADAMW)
    ]  # fmt: skip
    infos = [(given or {}).get(info.name, info) for info in infos]
    memory = MemoryModel(parallel, ADAMW, StepShape(shape, number), data)
    return PeakModel(memory, only(), list(unit_costs(marked, shape)), infos, fused, on_gpu)


def alone(**options: Any) -> dict[str, Peak]:
    """Return the peaks of seven ranks, each with one unit."""
    return dict(zip(UNITS, model(pipeline=7, **options).peaks(EVERY), strict=True))


def costs(own: PeakModel) -> dict[str, UnitCost]:
    """Costs by name; in 16 bits each norm of T5 keeps its input and its result in fp32: 6 bytes more than it costs."""
    shape, found = own.memory.step.micro_batch, {cost.name: cost for cost in own.costs}
    norms = {"encoder_block_0": 2 * shape.encoder_tokens, "decoder_block_0": 3 * shape.decoder_tokens}
    for name, positions in norms.items():
        if shape.element_bytes == 2 and found[name].kept_bytes and found[name].unit.recompute == "none":
            more = 6 * positions * shape.rows * 16
            found[name] = replace(found[name], kept_bytes=found[name].kept_bytes + more)
    return found


def test_each_unit_alone_in_bf16() -> None:
    """Passes of frozen units below all trained ones are forward ones; gradients stay in 16 bits beside a backward."""
    found = alone()
    expected = {name: 2.0 * size for name, size in FORWARD_OF.items() if name in ("patches", "vit_block_0")}
    expected |= {name: 2.0 * BACKWARD_OF[name] + 2 * TRAINED[name] for name in TRAINED} | {"head": LOSS}
    assert {name: peak.passing for name, peak in found.items()} == pytest.approx(expected)
    forward = {name for name, peak in found.items() if peak.moment == "forward 0"}
    assert forward == {"patches", "vit_block_0", "head"}
    assert {peak.moment for name, peak in found.items() if name not in forward} == {"backward 0"}
    priced = costs(model())
    kept = {name: (7 - rank) * priced[name].kept_bytes for rank, name in enumerate(UNITS)}
    kept["head"] += 2 * 64 * 16  # the gradient of its weights
    assert {name: peak.kept for name, peak in found.items()} == pytest.approx(kept)
    sizes = dict(zip(UNITS, (136, 736, 1312, 1760, 16, 2544, 1040), strict=True))
    stored = {name: 2 * size + 16 * TRAINED.get(name, 0) for name, size in sizes.items()}
    assert {name: peak.stored for name, peak in found.items()} == pytest.approx(stored)
    for peak in found.values():
        assert peak.buffers == 0 and peak.overhead == GIB + 3 * 2**20  # the world, and two neighbors
        assert peak.tensors == pytest.approx(peak.stored + peak.kept + peak.passing)
        assert peak.total == peak.tensors + peak.overhead


def test_each_unit_alone_in_fp32() -> None:
    """Gradients are added up where they are stored; neither logits nor the sum over chunks need a copy."""
    found = alone(element=4)
    assert {name: found[name].passing for name in TRAINED} == pytest.approx(
        {name: 4.0 * BACKWARD_OF[name] for name in TRAINED} | {"head": 10 * 64 * (4 + 4)}
    )
    priced = costs(model(element=4))
    assert found["head"].kept == pytest.approx(priced["head"].kept_bytes + 4 * 64 * 16)
    assert found["bridge"].stored == pytest.approx(4 * 1312 + (4 + 8) * 1296)


@pytest.mark.parametrize(("options", "stream"), [({}, 1.0), ({"sequence": True}, 0.5)])
def test_tensor_parallel_ranks_divide_the_widest_tensor_and_sequence_shards_the_stream(
    options: dict[str, Any], stream: float
) -> None:
    found = alone(tensor=2, **options)
    assert found["vit_block_0"].passing == pytest.approx(2 * (2 * stream * 64 + 192 / 2))
    assert found["encoder_block_0"].passing == pytest.approx(2 * (3 * stream * 528 + 2 * 1320 / 2) + 2 * 1760 / 2)
    assert found["head"].passing == pytest.approx(LOSS / 2)
    priced = costs(model())
    assert found["head"].kept == pytest.approx((priced["head"].kept_bytes + 2 * 64 * 16) / 2)
    assert found["head"].stored == pytest.approx(18 * 1040 / 2)
    # Two micro-batches in flight; the encoder's output is gathered for the block, and kept whole.
    gathered = 2 * 2 * 33 * 16 if stream < 1 else 0
    assert found["decoder_block_0"].kept == pytest.approx(2 * priced["decoder_block_0"].kept_bytes / 2 + gathered)
    assert found["decoder_block_0"].passing == pytest.approx(2 * (3 * 528 + 2 * 840 / 2) + 2 * 2544 / 2)


def test_a_rank_that_holds_the_vit_whole_has_its_share_of_the_images() -> None:
    found, divided = alone(tensor=2, replicate_frozen_vit=True), alone(tensor=2)
    assert found["vit_block_0"].passing == pytest.approx(2 * (2 * 64 / 2 + 192 / 2))
    assert found["vit_block_0"].stored == pytest.approx(2 * divided["vit_block_0"].stored) == 2 * 736
    assert found["encoder_block_0"] == divided["encoder_block_0"]


def test_scores_are_kept_twice_where_attention_is_not_fused() -> None:
    fused, plain = alone(), alone(fused=False)
    more = {name: plain[name].passing - fused[name].passing for name in UNITS}
    assert {name: size for name, size in more.items() if size} == pytest.approx(
        {"encoder_block_0": 2 * 2 * 726, "decoder_block_0": 2 * 2 * 3 * 2 * 77}
    )
    two = alone(fused=False, tensor=2)["encoder_block_0"].passing - alone(tensor=2)["encoder_block_0"].passing
    assert two == pytest.approx(2 * 726)
    encoder = ("bridge.*", "encoder_*")
    below = model(pipeline=2, fused=False, frozen=(*VIT, *encoder)).peaks([0, 5])[0]
    assert below.passing == pytest.approx(2 * (FORWARD_OF["encoder_block_0"] + 2 * 726))  # a forward pass
    assert below.kept == 0


def test_a_block_that_recomputes_holds_its_activations_once_more() -> None:
    for tensor in (1, 2):
        own = costs(model(recompute="block"))["encoder_block_0"]
        more = own.cost.activation_bytes - own.kept_bytes
        assert more > 0
        plain, again = (alone(tensor=tensor, recompute=kind)["encoder_block_0"] for kind in ("none", "block"))
        assert again.passing - plain.passing == pytest.approx(more / tensor)
        assert plain.kept - again.kept == pytest.approx(4 * (more + 6 * 2 * 33 * 16) / tensor)  # norms keep fp32


def test_chunks_of_the_loss() -> None:
    head, unit = alone(on_gpu=False)["head"], units(VIT)["head"]
    assert head.passing == 10 * 64 * 6 + 2 * 64 * 16 * 4  # a CPU multiplies fp32 copies
    given = {"head": replace(unit_infos(units(VIT).items(), ADAMW)[-1], trained=False, trained_elements=0)}
    frozen = alone(given=given, on_gpu=False)["head"]
    assert frozen.passing == 10 * 64 * 6
    assert frozen.kept == costs(model())["head"].kept_bytes
    own = unit.model
    try:
        for chunk in (21, 30):  # one chunk: nothing to add up
            unit.model = replace(own, loss_chunk=chunk)
            assert alone()["head"].passing == 21 * 64 * 6
        unit.model = replace(own, loss_chunk=20)
        assert alone()["head"].passing == 20 * 64 * 6 + 64 * 16 * 4
    finally:
        unit.model = own


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({}, 1), ({"data": 4}, 1), ({"tensor": 2}, 1), ({"tensor": 2, "data": 2}, 3), ({"pipeline": 2}, 1 + 1),
        ({"pipeline": 2, "data": 2}, 3 + 1), ({"pipeline": 3}, 1 + 2), ({"pipeline": 4}, 1 + 2),
        ({"tensor": 2, "pipeline": 2, "data": 2}, 6 + 1),
    ],
)  # fmt: skip
def test_overhead_counts_the_groups_of_ranks(options: dict[str, int], groups: int) -> None:
    own = model(**options)
    starts = range(options.get("pipeline", 1))
    assert {peak.overhead for peak in own.peaks(starts)} == {GIB + groups * 2**20}


def of_sizes(*sizes: float) -> dict[str, UnitInfo]:
    """Facts of the first units, in their order: all elements are trained."""
    infos = {info.name: info for info in unit_infos(units().items(), ADAMW)}
    given = zip(UNITS, map(int, sizes), strict=False)
    return {
        name: replace(infos[name], elements=size, trained_elements=size, copied=0, copied_trained=0)
        for name, size in given
    }


def test_what_tensor_ranks_hold_whole_is_not_divided() -> None:
    """Half of a block's matrices and all of its norms; one of two ranks stores 2 bytes of frozen elements."""
    (info,) = [info for info in unit_infos(units(("encoder_block_0.*",)).items(), ADAMW) if not info.trained]
    assert (info.elements, info.copied, info.copied_trained, info.largest) == (1760, 32, 0, 0)
    assert info.local(PAIR) == 1728 / 2 + 32 and info.local_trained(PAIR) == 0
    frozen = model(tensor=2, pipeline=7, given={"encoder_block_0": info}, frozen=())
    assert frozen.peaks(EVERY)[3].stored == 2 * info.local(PAIR)


LARGE = 2**24  # elements of a bucket of parallel/engine/replicated.py


@pytest.mark.parametrize(
    ("scale", "options", "passing"),
    [  # scale: times 6,656 trained elements, the largest unit 2,544
        (1e3, {"data": 2}, 4 * 6_656_000),  # all fit into a bucket of replicas' sums
        (1e3, {"data": 2, "tensor": 2}, 4 * 3_328_000),
        (4e3, {"data": 2}, 4 * LARGE),
        (1e4, {"data": 2, "element": 4}, 4 * 25_440_000),  # the largest unit is more than a bucket
        (1e4, {"data": 2, "tensor": 2}, 4 * LARGE),
    ],
)
def test_sums_of_gradients_take_copies_after_the_passes(scale: float, options: dict[str, Any], passing: float) -> None:
    (peak,) = model(scale=scale, number=1, **options).peaks([0])
    assert (peak.moment, peak.passing, peak.kept) == ("update", pytest.approx(passing), 0)
    assert peak.buffers == 0


@pytest.mark.parametrize(("stage", "tensor"), [(1, 1), (2, 2)])
def test_new_weights_are_sent_from_a_copy_in_16_bits(stage: int, tensor: int) -> None:
    (peak,) = model(scale=1e4, number=2, zero_stage=stage, data=4, tensor=tensor).peaks([0])
    assert (peak.moment, peak.passing) == ("update", pytest.approx(2 * 66_560_000 / 4 / tensor))
    own = model(scale=1e4, number=2, zero_stage=stage, data=4, element=4)
    assert own._update(own.infos, 0.0, 0.0).passing == 0  # fp32 weights are sent as they are


def test_one_replica_sums_nothing_and_zero_3_has_no_copies() -> None:
    assert model(scale=1e3, element=4).peaks([0])[0].moment != "update"
    assert model(scale=1e6, data=2, zero_stage=3, reduce="micro_batch").peaks([0])[0].moment != "update"


def backward(own: PeakModel, grads: bool, scale: float = 0) -> list[float]:
    """Return the bytes beyond what is kept during each unit's backward pass, last unit first.

    `scale`: of the parameter whose gradient is made before ZeRO moves it.
    """
    priced, element = costs(own), own.memory.step.micro_batch.element_bytes
    found, held, freed = [], 0.0, 0.0
    for name in reversed(list(TRAINED)):
        own_grads = element * own.infos[UNITS.index(name)].trained_elements if grads else 0
        held += own_grads if name != "head" else 0  # the head's exist since the forward pass, as something it keeps
        found.append(element * (BACKWARD_OF[name] + scale * LARGEST[name]) + held - freed)
        held += own_grads if name == "head" else 0
        freed += priced[name].kept_bytes + (element * 64 * 16 if name == "head" else 0)
    return [*found, held - freed]


def everything_kept(own: PeakModel) -> float:
    return sum(cost.kept_bytes for cost in costs(own).values()) + 64 * 16 * own.memory.step.micro_batch.element_bytes


@pytest.mark.parametrize("scale", [1, 5, 40, 1000])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("number", [1, 2])
def test_a_whole_model_in_bf16(scale: int, stage: int, number: int) -> None:
    """ZeRO moves each gradient into its bucket at once."""
    own = model(scale=scale, number=number, zero_stage=stage, data=8 if stage else 1)
    peak = max(own.peaks([0]), key=lambda each: each.total)
    *passes, _ = backward(own, grads=stage == 0, scale=scale if stage else 0)
    before = [2 * 6656 * scale] if stage == 0 and number > 1 else []  # those of the micro-batch before
    buckets = [0.0] * 5
    if stage:
        sizes = [scale * size for size in TRAINED.values()]
        buckets = held_in_backward(sizes, Sending(8, 4, whole=number > 1, keeps_sums=True))[0][::-1]
    expected = max([*map(sum, zip(passes, buckets, strict=True)), *before, LOSS])
    if peak.moment == "update":
        assert stage and peak.passing == pytest.approx(2 * 6656 * scale / 8)
        return
    assert peak.passing + peak.buffers == pytest.approx(expected)
    assert peak.moment == ("forward 0" if expected == LOSS else "backward 0")
    assert peak.kept == pytest.approx(everything_kept(own))


def test_a_whole_model_in_fp32() -> None:
    own = model(element=4)
    (peak,) = own.peaks([0])
    assert max(backward(own, grads=False)) < 4 * FORWARD_OF["encoder_block_0"]
    assert (peak.moment, peak.passing) == ("forward 0", pytest.approx(4 * FORWARD_OF["encoder_block_0"]))


@pytest.mark.parametrize("tensor", [1, 2])
def test_zero_3_gathers_units(tensor: int) -> None:
    """The unit of a pass, the next one, and those that stay gathered because their backward pass follows at once."""

    def passing(scale: float, **options: Any) -> float:
        own = model(scale=scale * tensor, data=2, tensor=tensor, zero_stage=3, **options)
        return own._in_forward(0, 7)[0]

    loss = pytest.approx(2 * 6656e4 + LOSS / tensor, rel=1e-9)  # of at most 1e9 elements all stay
    assert passing(1e4) == loss
    assert passing(1e4, shard_frozen=True) == pytest.approx(2 * 7544e4 + LOSS / tensor, rel=1e-9)
    # No head of more than 1e9 stays: the decoder's block and the head, in the head's pass or just before it.
    assert passing(1e6) == pytest.approx(2 * 3584e6, rel=1e-5)
    assert passing(5e5) == pytest.approx(2 * 5e5 * max(2544 + 1040, 16 + 2544, 1760 + 1296), rel=1e-5)
    assert passing(1e6, gather="step") == passing(
        1, gather="step"
    )  # all is gathered for the step, and counted as stored


def test_zero_3_moves_gradients_into_its_bucket_at_once() -> None:
    """Gathered parameters are beside a pass, gradients of units above are not."""
    found = alone(zero_stage=3, data=2)
    encoder = found["encoder_block_0"]
    assert encoder.moment == "backward 0"
    assert encoder.passing == 2 * (BACKWARD_OF["encoder_block_0"] + 1760 + LARGEST["encoder_block_0"])
    assert found["head"].passing == LOSS + 2 * 1040 and found["head"].moment == "forward 0"
    assert alone(decoder_tokens=70)["head"].passing == 2 * 2 * 210 * 16  # more than a chunk of logits
    own = model(zero_stage=3, data=2, pipeline=2, decoder_tokens=70)
    widest, stream = 210 * 40, 210 * 16
    freed = costs(own)["head"].kept_bytes + 2 * 64 * 16
    last = own.peaks([0, 5])[1]
    assert last.moment == "backward 0"
    assert last.passing == pytest.approx(2 * (3 * stream + 2 * widest) + 2 * (2544 + 640) - freed)


@pytest.mark.parametrize("sizes", [(3e8, 4e8, 1e8), (1e8, 8e8, 9e8), (1.2e9, 8e8, 1e7)])
def test_a_forward_pass_gathers_the_next_unit_too(sizes: tuple[float, float, float]) -> None:
    own = model(given=of_sizes(*sizes), zero_stage=3, data=2, pipeline=2, reduce="micro_batch")
    pairs = [2 * (a + b) for a, b in pairwise(sizes)]
    assert own._in_forward(0, 3)[0] == pytest.approx(max(pairs), rel=1e-5)


def test_a_schedule_that_begins_with_all_forward_passes_keeps_them_all() -> None:
    """GPipe keeps every micro-batch, however many there are; 1F1B no more than there are ranks after it."""
    kept = costs(model())["decoder_block_0"].kept_bytes
    for schedule, number, expected in (("gpipe", 100, 100), ("1f1b", 100, 2), ("1f1b", 2, 2), ("gpipe", 3, 3)):
        own = model(pipeline=7, schedule=schedule, number=number)
        short = 7 if number < 7 else 0  # too few micro-batches for 1F1B: all forward passes come first
        assert own.peaks(EVERY)[5].kept == pytest.approx((number if short else expected) * kept), schedule


def test_interleaved_stages_are_added_up_pass_by_pass() -> None:
    own = model(pipeline=2, virtual_stages=2, number=4, scale=0)
    starts, sizes = [0, 3, 4, 5], [cost.kept_bytes for cost in costs(own).values()]
    sizes[6] += 2 * 64 * 16
    peaks = own.peaks(starts)
    assert len(peaks) == 2
    moments = kept_counts(Pipeline(2, 2, 4, "1f1b"))
    # Rank 0 has units 0 to 2 and 4, rank 1 has unit 3, and 5 and 6.
    kept = [(sum(sizes[0:3]), sizes[4]), (sizes[3], sum(sizes[5:7]))]
    forward = [(640, 0), (2 * 2376, LOSS)]
    last = max(2 * BACKWARD_OF["head"], 2 * BACKWARD_OF["decoder_block_0"] - sizes[6])
    passing = [(2 * 3 * 128, 0), (2 * BACKWARD_OF["encoder_block_0"], last)]
    for rank in (0, 1):
        totals = {}
        for name, counts in moments[rank]:
            held = sum(number * size for number, size in zip(counts, kept[rank], strict=True))
            index = int(name[-1])
            extra = forward[rank][index] if name.startswith("forward") else passing[rank][index]
            totals[name, held] = held + extra
        best = max(totals, key=lambda each: totals[each])
        assert (peaks[rank].moment, peaks[rank].kept) == (best[0], pytest.approx(best[1]))
        assert peaks[rank].kept + peaks[rank].passing == pytest.approx(totals[best])
