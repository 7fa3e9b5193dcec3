"""Times of a unit, counted by hand: each test has hardware that charges for one thing, 1 second for each."""

from copy import copy
from dataclasses import replace

import pytest

from model.costs import BatchShape, attention_flops
from parallel.config import ParallelConfig
from parallel.plan.collectives import Group
from parallel.plan.hardware import Hardware
from parallel.plan.unit_time import UnitClock
from tests.unit.parallel.plan.tiny import SHAPE, only, units

BLOCKS = ("vit_block_0", "encoder_block_0", "decoder_block_0")
PAIR = {"tensor": 2}
SEQUENCE = {"tensor": 2, "sequence": True}


def seconds(
    name: str,
    hardware: Hardware,
    options: dict[str, object] | None = None,
    *,
    fused: bool = True,
    trained: bool = True,
    below: bool = True,
    recompute: str = "none",
    shape: BatchShape = SHAPE,
) -> tuple[float, float, float, float]:
    """Return (forward compute, forward messages, backward compute, backward messages)."""
    unit = copy(units()[name])
    unit.recompute = recompute
    parallel = ParallelConfig(**(options or {}))  # type: ignore[arg-type]
    clock = UnitClock(hardware, parallel, Group(parallel.tensor, parallel.tensor), shape, fused)
    time = clock.for_unit(unit).time(unit, trained, below)
    assert time.total_s == time.forward.total_s + time.backward.total_s
    return time.forward.compute_s, time.forward.tensor_s, time.backward.compute_s, time.backward.tensor_s


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", BLOCKS)
def test_arithmetic_is_that_of_the_cost_and_tensor_parallelism_divides_it(name: str, ranks: int) -> None:
    """Backward: two products for each, one without gradients of weights; 2.5 times a fused attention, twice another."""
    whole = units()[name].cost(SHAPE).flops / ranks
    attention = {"vit_block_0": (2, [(4, 4)], 8), "encoder_block_0": (3, [(11, 11)], 12),
                 "decoder_block_0": (3, [(7, 7), (7, 11)], 12)}  # fmt: skip
    rows, lengths, inner = attention[name]
    attended = sum(attention_flops(rows, *pair, inner) for pair in lengths) / ranks
    linear, slow, split = whole - attended, only(flops=1.0), {"tensor": ranks}
    expected = whole, 2 * linear + 2.5 * attended
    assert seconds(name, slow, split)[::2] == pytest.approx(expected)
    frozen = seconds(name, slow, split, trained=False)
    assert frozen[::2] == pytest.approx((whole, linear + 2.5 * attended))
    if name != "vit_block_0":  # the ViT's attention is always fused
        assert seconds(name, slow, split, fused=False)[::2] == pytest.approx((whole, 2 * whole))
    half = seconds(name, only(flops=1.0, attention=0.5), split)
    assert half[0] == pytest.approx(whole + attended)
    assert seconds(name, slow, split, trained=False, below=False)[2:] == (0, 0)


def test_arithmetic_of_the_other_units() -> None:
    slow = only(flops=1.0)
    assert seconds("patches", slow)[::2] == pytest.approx((2 * 8 * 12 * 8, 2 * 2 * 8 * 12 * 8))
    assert seconds("bridge", slow, PAIR)[::2] == pytest.approx((2 * 8 * 8 * 16, 2 * 2 * 8 * 8 * 16))
    assert seconds("bridge", slow, SEQUENCE)[0] == pytest.approx(8 * 8 * 16)  # its positions are divided
    assert seconds("encoder_norm", slow)[::2] == (0, 0)
    for ranks in (1, 2):  # the loss computes logits and both gradients in the forward pass
        head = seconds("head", slow, {"tensor": ranks})
        assert head[::2] == pytest.approx((3 * 2 * 21 * 16 * 64 / ranks, 0))


LAUNCHES = {  # forward, backward; an attention that is not fused launches 8 kernels
    ("patches", True): (8 + 1, 2 * 8 + 2),
    ("vit_block_0", True): (14 + 4 + 1, 2 * 14 + 8 + 2),
    ("vit_block_0", False): (14 + 4 + 1, 2 * 14 + 8 + 2),
    ("bridge", True): (16 + 1, 2 * 16 + 2 + 3),  # and the table's gradient
    ("encoder_block_0", True): (16 + 4 + 1, 2 * 16 + 8 + 2),
    ("encoder_block_0", False): (16 + 4 + 8, 2 * 16 + 8 + 8),
    ("encoder_norm", True): (1, 2),
    ("decoder_block_0", True): (22 + 7 + 2, 2 * 22 + 14 + 4),
    ("decoder_block_0", False): (22 + 7 + 16, 2 * 22 + 14 + 16),
    ("head", True): (4 + 3 * (3 + 16 + 8), 2 * 4 + 2),  # chunks of 10, 10 and 1 target
}


@pytest.mark.parametrize(("name", "fused"), LAUNCHES)
def test_launches(name: str, fused: bool) -> None:
    slow, expected = only(launch_s=1.0), LAUNCHES[name, fused]
    assert seconds(name, slow, fused=fused)[::2] == pytest.approx(expected)
    linears = {"patches": 1, "bridge": 1, "encoder_norm": 0, "head": 0, "decoder_block_0": 7}.get(name, 4)
    tables = 3 if name == "bridge" else 0
    frozen = seconds(name, slow, fused=fused, trained=False)[2]
    assert frozen == pytest.approx(expected[1] - linears - tables)  # no gradient of a weight
    attentions = {"encoder_block_0": 1, "decoder_block_0": 2}.get(name, 0) * (not fused)
    norms, mlps = ({"decoder_block_0": 3}.get(name, 2), 1) if name in BLOCKS else (0, 0)
    more = {"block": expected[0], "attention": 8 * attentions, "norm": norms, "mlp": mlps, "elementwise": norms + mlps}
    for recompute, again in more.items():
        found = seconds(name, slow, fused=fused, recompute=recompute)
        assert found[0] == pytest.approx(expected[0]) and found[2] == pytest.approx(expected[1] + again), recompute


def test_a_loss_in_one_chunk_adds_nothing_up() -> None:
    unit = units()["head"]
    own = unit.model
    try:
        for chunk, chunks, sums in ((21, 1, 0), (7, 3, 8), (20, 2, 8)):
            unit.model = replace(own, loss_chunk=chunk)
            assert seconds("head", only(launch_s=1.0))[0] == pytest.approx(4 + chunks * (3 + 16 + sums))
    finally:
        unit.model = own


def product(rows: float, inner: float, columns: float) -> float:
    """Return the elements of both factors and the result."""
    return rows * inner + inner * columns + rows * columns


VIT_LINEAR = product(8, 8, 24) + product(8, 8, 8) + product(8, 8, 24) + product(8, 24, 8)
ENCODER_LINEAR = product(33, 16, 36) + product(33, 12, 16) + product(33, 16, 40) + product(33, 20, 16)
ENCODER_HALVES = product(33, 16, 18) + product(33, 6, 16) + product(33, 16, 20) + product(33, 10, 16)
# A chunk of logits of `n` targets: three products, ten passes over fp32 logits, three over the sum's fp32 matrix.
CHUNK = {n: 2 * 3 * product(n, 16, 64) + 10 * 4 * n * 64 + 3 * 4 * 64 * 16 for n in (10, 1)}
MOVED = {  # (name, options, fused): bytes forward, backward; elementwise work moves twice as much backward
    ("patches", "", True): (2 * (960 + product(8, 12, 8)), 2 * (2 * 960 + 2 * product(8, 12, 8))),
    ("vit_block_0", "", True): (2 * (1920 + VIT_LINEAR + 256), 2 * (2 * 1920 + 2 * VIT_LINEAR + 512)),
    ("bridge", "", True): (2 * (7296 + product(8, 8, 16)), 2 * (2 * 7296 + 2 * product(8, 8, 16) + 3 * 54 * 16)),
    ("bridge", "pair", True): (2 * (7296 + product(8, 8, 16)), 2 * (2 * 7296 + 2 * product(8, 8, 16) + 3 * 54 * 16)),
    ("bridge", "sequence", True): (
        2 * (3648 + product(4, 8, 16)), 2 * (2 * 3648 + 2 * product(4, 8, 16) + 3 * 54 * 16)
    ),
    ("encoder_block_0", "", True): (
        2 * (5280 + 6468 + ENCODER_LINEAR + 1584), 2 * (2 * (5280 + 6468) + 2 * ENCODER_LINEAR + 2 * 1584)
    ),
    ("encoder_block_0", "", False): (  # eight passes over the scores
        2 * (5280 + 6468 + ENCODER_LINEAR + 1584 + 8 * 726),
        2 * (2 * (5280 + 6468) + 2 * ENCODER_LINEAR + 2 * 1584 + 8 * 726),
    ),
    ("encoder_block_0", "pair", True): (
        2 * (5280 + 3234 + ENCODER_HALVES + 792), 2 * (2 * (5280 + 3234) + 2 * ENCODER_HALVES + 2 * 792)
    ),
    ("encoder_block_0", "sequence", True): (
        2 * (2640 + 3234 + ENCODER_HALVES + 792), 2 * (2 * (2640 + 3234) + 2 * ENCODER_HALVES + 2 * 792)
    ),
    ("encoder_norm", "", True): (2 * 1056, 2 * 2 * 1056),
    ("encoder_norm", "sequence", True): (2 * 528, 2 * 2 * 528),
    ("head", "", True): (2 * 1344 + 2 * CHUNK[10] + CHUNK[1], 2 * 2 * 1344 + 4 * 16 * (21 + 64)),
    ("head", "pair", True): (
        2 * 1344 + 2 * (2 * 3 * product(10, 16, 32) + 40 * 10 * 32 + 12 * 32 * 16)
        + 2 * 3 * product(1, 16, 32) + 40 * 32 + 12 * 32 * 16,
        2 * 2 * 1344 + 4 * 16 * (21 + 32),
    ),
}  # fmt: skip
OPTIONS: dict[str, dict[str, object]] = {"": {}, "pair": PAIR, "sequence": SEQUENCE}


@pytest.mark.parametrize(("name", "options", "fused"), MOVED)
def test_bytes_that_move_through_memory(name: str, options: str, fused: bool) -> None:
    found = seconds(name, only(memory=1.0), OPTIONS[options], fused=fused)
    assert found[::2] == pytest.approx(MOVED[name, options, fused])


def test_bytes_that_move_again_under_recomputation() -> None:
    """Of an encoder block: norms move 2112 elements of the stream, the MLP's activation 1980 inner ones."""
    slow = only(memory=1.0)
    for options, norms, mlp in (("", 2112, 1980), ("pair", 2112, 990), ("sequence", 1056, 990)):
        more = {}
        base = seconds("encoder_block_0", slow, OPTIONS[options])[2]
        for kind in ("norm", "mlp", "elementwise"):
            more[kind] = seconds("encoder_block_0", slow, OPTIONS[options], recompute=kind)[2] - base
        assert more == pytest.approx({"norm": 2 * norms, "mlp": 2 * mlp, "elementwise": 2 * (norms + mlp)})
    scores = seconds("encoder_block_0", slow, fused=False, recompute="attention")[2]
    assert scores - seconds("encoder_block_0", slow, fused=False)[2] == pytest.approx(2 * (1584 + 8 * 726))


@pytest.mark.parametrize(
    ("name", "pair", "sequence"),
    [  # bytes (forward, backward) that each of two ranks moves: all-reduce 1, gather and scatter 1/2 of the whole
        ("patches", (0, 0), (0, 64)),
        ("vit_block_0", (2 * 128, 2 * 128), (2 * 64 + 2 * 64, 2 * 128 + 2 * 64)),
        ("bridge", (2 * 54 * 16, 0), (2 * 54 * 16 + 8 * 16, 54 * 16)),
        ("encoder_block_0", (2 * 1056, 2 * 1056), (2 * 528 + 2 * 528, 2 * 1056 + 2 * 528)),
        ("encoder_norm", (0, 0), (0, 0)),
        (
            "decoder_block_0",
            (3 * 672, 3 * 672),
            (3 * 336 + 3 * 336, 3 * 672 + 3 * 336),
        ),
        ("head", (12 * 21, 672), (12 * 21 + 336, 336)),  # three fp32 numbers of every target
    ],
)
def test_messages_between_tensor_parallel_ranks(
    name: str, pair: tuple[float, float], sequence: tuple[float, float]
) -> None:
    links = only(node=1.0)
    assert seconds(name, links, PAIR)[1::2] == pytest.approx(pair)
    assert seconds(name, links, SEQUENCE)[1::2] == pytest.approx(sequence)
    assert seconds(name, links)[1::2] == (0, 0)
    frozen = seconds(name, links, SEQUENCE, trained=False)[3]  # inputs are gathered again for gradients of weights only
    again = {"vit_block_0": 2 * 64, "encoder_block_0": 2 * 528, "decoder_block_0": 3 * 336}.get(name, 0)
    assert frozen == pytest.approx(sequence[1] - again)


def test_a_vit_that_each_rank_holds_whole_runs_on_its_images_and_sends_one_message() -> None:
    """One of two images on each rank; the bridge gathers their 8 projected tokens, as under sequence parallelism."""
    whole, links = {"tensor": 2, "replicate_frozen_vit": True}, only(node=1.0)
    for name in ("patches", "vit_block_0"):
        found = seconds(name, only(flops=1.0), whole, trained=False, below=False)
        assert found == pytest.approx((units()[name].cost(SHAPE).flops / 2, 0, 0, 0))
        assert seconds(name, links, whole, trained=False, below=False) == (0, 0, 0, 0)
    assert seconds("bridge", links, whole)[1::2] == (seconds("bridge", links, SEQUENCE)[1], 0)
    assert seconds("bridge", only(flops=1.0), whole) == seconds("bridge", only(flops=1.0), SEQUENCE)
    assert seconds("encoder_block_0", links, whole) == seconds("encoder_block_0", links, PAIR)


def test_gradients_of_inputs_are_sent_beside_those_of_weights() -> None:
    """Both column maps of an encoder block: 2 x 33 x 16 x 18 FLOPs of a rank's product take 500 s, 1,056 B 1,056 s."""
    hardware = only(flops=2 * 33 * 16 * 18 / 500, node=1.0)
    first, second = 500, 500 * 20 / 18
    hidden = seconds("encoder_block_0", hardware, PAIR)[3]
    assert hidden == pytest.approx(1056 - first + 1056 - second)
    # Sequence shards: the gathering (528 s) beside the inputs' gradient, the scattering beside the weights'; each row
    # map gathers 528 s more.
    hidden = seconds("encoder_block_0", hardware, SEQUENCE)[3]
    assert hidden == pytest.approx((528 - first) * 2 + 0 + 2 * 528)
