"""Operators add up to the FLOPs of each unit's cost; times follow from them, and from what is divided or recomputed."""

from dataclasses import replace

import pytest
import torch

from model.costs import BatchShape
from model.describe import read_model
from model.layers import TensorParallel
from model.mt5 import EncoderBlock
from model.pali import plan_on_meta
from parallel.config import ParallelConfig
from parallel.plan.collectives import Group
from parallel.plan.hardware import read_hardware
from parallel.plan.operators import operators
from parallel.plan.unit_time import UnitClock, UnitTime

SHAPES = [BatchShape(3, 64, 2, 96, 32), BatchShape(8, 64, 8, 512, 128), BatchShape(1, 64, 1, 80, 7)]


@pytest.mark.parametrize("shape", SHAPES)
def test_operators_have_the_flops_of_the_cost(shape: BatchShape) -> None:
    config, _ = read_model(["phases=mini"])
    for name, unit in plan_on_meta(config).units():
        assert operators(unit, shape, True).flops == pytest.approx(unit.cost(shape).flops, rel=1e-12), name


def seconds(
    recompute: str = "none", trained: bool = True, below: bool = True, fused: bool = True, **parallel: object
) -> UnitTime:
    """Time a block of mT5-XXL for 8 rows on an H100."""
    config, _ = read_model(["phases=mini", "mt5=xxl"])
    block = EncoderBlock(replace(config.mt5, num_encoder_layers=1, vocab_size=1024), config.model, TensorParallel())
    block.recompute = recompute
    options = ParallelConfig(**parallel)  # type: ignore[arg-type]
    group = Group.from_stride(options.tensor, 1, 8)
    shape = BatchShape(8, 256, 8, 512, 128)
    return UnitClock(read_hardware("h100_sxm"), options, group, shape, fused).time(block, trained, below)


def test_a_block_takes_its_flops_at_a_plausible_rate() -> None:
    with torch.device("meta"):
        whole = seconds()
    flops = 2 * 4096 * 4096 * (4 * 4096 + 3 * 10240) + 4 * 8 * 512 * 512 * 4096
    assert 350e12 < flops / whole.forward.compute_s < 0.8 * 989e12
    assert 1.9 < whole.backward.compute_s / whole.forward.compute_s < 2.3


def test_division_freezing_and_recomputation() -> None:
    with torch.device("meta"):
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
