"""Our Adafactor on flat shards against transformers' on whole matrices, and the memory that its state takes."""

import pytest
import torch
from torch import Tensor
from transformers.optimization import Adafactor as ReferenceAdafactor

from model.layers import OneProcess, Part, zeros
from parallel.adafactor import Adafactor
from parallel.config import OptimizerConfig
from parallel.fragments import rectangles
from parallel.optimizer import Shard

SHAPES = {"matrix": (12, 20), "tall": (40, 3), "vector": (17,), "never_used": (5, 6)}


def make(parts: dict[str, Tensor], cuts: list[int], config: OptimizerConfig) -> tuple[Adafactor, list[Shard]]:
    """One optimizer whose flat shards cut the concatenation of all tensors at `cuts`, anywhere."""
    flat = torch.cat([values.flatten() for values in parts.values()])
    shards = []
    for first, last in zip([0, *cuts], [*cuts, len(flat)], strict=True):
        found, start = [], 0
        for name, values in parts.items():
            part = Part(name, values.shape, zeros, (0,) * values.dim(), values.shape, start)
            found += rectangles([part], first, last - first, 0, once=True)
            start += values.numel()
        shards.append(Shard(flat[first:last].clone(), found))
    optimizer = Adafactor([torch.nn.Parameter(shard.weights) for shard in shards], config)
    optimizer.param_groups[0]["params"] = [shard.weights for shard in shards]
    OneProcess()  # the optimizer's collectives need a process group
    optimizer.bind(shards, {name: values.shape for name, values in parts.items()}, torch.distributed.group.WORLD)
    return optimizer, shards


@pytest.mark.parametrize("cuts", [[], [7], [12, 100, 101, 240, 359], [250, 300]])
@pytest.mark.parametrize("clipping", [1.0, 0.01])
def test_equals_the_plain_full_matrix_one(cuts: list[int], clipping: float) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    config = OptimizerConfig(update_clipping=clipping, min_dim_size_to_factor=1)
    optimizer, shards = make(whole, cuts, config)
    expected = [values.clone().requires_grad_() for values in whole.values()]
    reference = ReferenceAdafactor(
        expected, lr=1e-2, clip_threshold=clipping, relative_step=False, scale_parameter=True, warmup_init=False
    )
    optimizer.set_learning_rate(1e-2)
    for _ in range(100):
        gradients = [torch.randn(values.shape, generator=generator) for values in expected]
        gradients[-1].zero_()
        for values, gradient in zip(expected, gradients, strict=True):
            values.grad = gradient
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        for shard, piece in zip(shards, flat.split([len(s.weights) for s in shards]), strict=True):
            shard.weights.grad = piece.clone()
        reference.step()
        optimizer.step()
    found = torch.cat([shard.weights for shard in shards])
    wanted = torch.cat([values.detach().flatten() for values in expected])
    assert torch.linalg.vector_norm(found - wanted) <= 1e-6 * torch.linalg.vector_norm(wanted)
    assert not torch.equal(found, torch.cat([values.flatten() for values in whole.values()]))


def test_small_sides_are_not_factored() -> None:
    """T5X factors only where both sides have at least 128 rows or columns."""
    parts = {"large": torch.ones(128, 200), "thin": torch.ones(127, 400), "bias": torch.ones(300)}
    optimizer, _ = make(parts, [], OptimizerConfig())
    assert set(optimizer.moments) == {"large"}
    assert {r.name for r in optimizer.full} == {"thin", "bias"}
    numbers = sum(values.numel() for _, _, values in optimizer.state_pieces())
    assert numbers == 128 + 200 + 127 * 400 + 300


def test_skipped_steps_change_nothing() -> None:
    optimizer, (shard,) = make({"matrix": torch.ones(130, 130)}, [], OptimizerConfig())
    shard.weights.grad = torch.ones_like(shard.weights)
    optimizer.set_learning_rate(1.0)
    optimizer.skip = True
    optimizer.step()
    assert optimizer.ages == {"matrix": 0}
    assert torch.equal(shard.weights, torch.ones(130 * 130))
    optimizer.skip = False
    optimizer.step()
    assert optimizer.ages == {"matrix": 1}
    assert not torch.equal(shard.weights, torch.ones(130 * 130))
