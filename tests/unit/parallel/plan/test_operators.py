"""Operators add up to the FLOPs of each unit's cost; times follow from them, and from what is divided or recomputed."""

from copy import copy
from dataclasses import replace
from functools import cache

import pytest
import torch

from model.config import ClassifierConfig
from model.costs import BatchShape
from model.describe import read_model
from model.mt5 import EncoderBlock
from model.pali import plan_on_meta
from model.tensor_parallel import TensorParallel
from parallel.config import ParallelConfig
from parallel.plan.collectives import Group
from parallel.plan.hardware import read_hardware
from parallel.plan.operators import Attention, Linear, Operators, Vocabulary, operators
from parallel.plan.unit_time import UnitClock, UnitTime
from tests.unit.parallel.plan.tiny import SHAPE, UNITS, units

SHAPES = [BatchShape(3, 64, 2, 96, 32), BatchShape(8, 64, 8, 512, 128), BatchShape(1, 64, 1, 80, 7)]


@pytest.mark.parametrize("shape", SHAPES)
def test_operators_have_the_flops_of_the_cost(shape: BatchShape) -> None:
    whole, _ = read_model(["phases=mini"])
    clock = UnitClock(read_hardware("h100_sxm"), ParallelConfig(tensor=2, sequence=True), Group(2, 2), shape, True)
    for tower, head in ((None, "none"), ("mt5", "none"), ("vit", "map"), ("vit", "patches")):
        config = replace(whole, tower=tower, classifier=ClassifierConfig(head, 7))
        for name, unit in plan_on_meta(config).units():
            assert operators(unit, shape, True).flops == pytest.approx(unit.cost(shape).flops, rel=1e-12), name
            assert clock.time(unit, True, False).forward.compute_s > 0, name


@pytest.mark.parametrize("fused", [True, False])
def test_operators_of_every_unit(fused: bool) -> None:
    """Elements are reads and writes: 8 visual, 33 encoder and 21 decoder tokens; widths 8, 16, 12 (heads), 24, 20."""
    expected = {
        "patches": Operators((Linear(8, 12, 8, "whole"),), (), 8 * (6 * 12 + 6 * 8), 0.0, 8, scattered=(8 * 8,)),
        "vit_block_0": Operators(
            (Linear(8, 8, 24, "column"), Linear(8, 8, 8, "row"), Linear(8, 8, 24, "column"), Linear(8, 24, 8, "row")),
            (Attention(2, 2, 4, 4, 4, True),), 8 * 80, 8 * (64 + 96), 14,
            norms=2, norm_elements=8 * 32, mlp_elements=8 * 48,
        ),
        "bridge": Operators(
            (Linear(8, 8, 16, "whole"),), (), 8 * (16 + 32) + 54 * 8 * 16, 0.0, 16,
            embedded_tokens=54, embedded_width=16, scattered=(33 * 16, 21 * 16), gathered=(8 * 16,),
        ),
        "encoder_block_0": Operators(
            (Linear(33, 16, 36, "column"), Linear(33, 12, 16, "row"), Linear(33, 16, 40, "column"),
             Linear(33, 20, 16, "row")),
            (Attention(3, 2, 11, 11, 6, fused),), 33 * 160, 33 * (96 + 100), 16,
            norms=2, norm_elements=33 * 64, mlp_elements=33 * 60,
        ),
        "encoder_norm": Operators(stream_elements=2 * 33 * 16, launches=1),
        "decoder_block_0": Operators(
            (Linear(21, 16, 36, "column"), Linear(21, 12, 16, "row"), Linear(21, 16, 40, "column"),
             Linear(21, 20, 16, "row"), Linear(21, 16, 12, "column"), Linear(33, 16, 24, "memory"),
             Linear(21, 12, 16, "row")),
            (Attention(3, 2, 7, 7, 6, fused), Attention(3, 2, 7, 11, 6, fused)),
            21 * 240, 21 * (144 + 100) + 33 * 48, 22, norms=3, norm_elements=21 * 96, mlp_elements=21 * 60,
        ),
        "head": Operators(stream_elements=4 * 21 * 16, launches=4, vocabulary=Vocabulary(21, 16, 64, 10)),
    }  # fmt: skip
    assert {name: operators(unit, SHAPE, fused) for name, unit in units().items()} == expected
    assert tuple(expected) == UNITS
    assert Operators() == Operators((), (), 0.0, 0.0, 0, None, 0, 0, 0.0, 0.0)
    (attention,) = expected["encoder_block_0"].attentions
    assert (attention.io_elements, attention.score_elements) == (2 * 3 * 12 * 22, 3 * 2 * 121)


@cache
def xxl_block() -> EncoderBlock:
    config, _ = read_model(["phases=mini", "mt5=xxl"])
    with torch.device("meta"):
        return EncoderBlock(config.mt5, config.model, TensorParallel())


def seconds(
    recompute: str = "none", trained: bool = True, below: bool = True, fused: bool = True, **parallel: object
) -> UnitTime:
    """Time a block of mT5-XXL for 8 rows on an H100."""
    block = copy(xxl_block())
    block.recompute = recompute
    options = ParallelConfig(**parallel)  # type: ignore[arg-type]
    group = Group.from_stride(options.tensor, 1, 8)
    shape = BatchShape(8, 256, 8, 512, 128)
    return UnitClock(read_hardware("h100_sxm"), options, group, shape, fused).time(block, trained, below)


def test_a_block_takes_its_flops_at_a_plausible_rate() -> None:
    whole = seconds()
    flops = 2 * 4096 * 4096 * (4 * 4096 + 3 * 10240) + 4 * 8 * 512 * 512 * 4096
    assert 350e12 < flops / whole.forward.compute_s < 0.8 * 989e12
    assert 1.9 < whole.backward.compute_s / whole.forward.compute_s < 2.3


def test_division_freezing_and_recomputation() -> None:
    whole, half = seconds(), seconds(tensor=2, sequence=True)
    plain = seconds(tensor=2)
    assert 0.45 < half.forward.compute_s / whole.forward.compute_s < 0.6
    assert half.forward.compute_s < plain.forward.compute_s and half.forward.tensor_s > 0
    assert seconds(trained=False, below=False).backward.total_s == 0
    assert seconds(trained=False).backward.total_s < whole.backward.total_s
    again = seconds("block").backward.total_s - whole.backward.total_s
    assert again == pytest.approx(whole.forward.total_s)
    assert seconds("attention").backward.total_s == whole.backward.total_s, "a fused kernel keeps no scores"
    unfused = [seconds(kind, fused=False).backward.total_s for kind in ("none", "attention", "block")]
    assert unfused == sorted(set(unfused))
    mlp, norm, both = (seconds(kind).backward.total_s for kind in ("mlp", "norm", "elementwise"))
    assert whole.backward.total_s < norm < mlp < both < whole.backward.total_s + 0.1 * whole.forward.total_s
    assert both - whole.backward.total_s == pytest.approx(mlp + norm - 2 * whole.backward.total_s)
