"""Our Adafactor on flat shards against transformers' on whole matrices, T5X and big_vision; the memory of its state."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.optimization import Adafactor as ReferenceAdafactor

from model.config import ModelConfig, MT5Config, PaLIConfig, ViTConfig
from model.describe import read_model
from model.initializers import zeros
from model.layers import Part, parameter_parts
from model.pali import plan_on_meta
from model.weights.big_vision import Layout, flax_layouts
from parallel.config import OptimizerConfig
from parallel.optimizer.adafactor import Adafactor, state_bytes
from parallel.optimizer.base import Shard
from parallel.shards import rectangles
from tests.unit.parallel.optimizer import record_adafactor as recorded

SHAPES = {"matrix": (12, 20), "tall": (40, 3), "vector": (17,), "never_used": (5, 6)}


def make(
    parts: dict[str, Tensor], cuts: list[int], config: OptimizerConfig, layouts: Mapping[str, Layout] | None = None
) -> tuple[Adafactor, list[Shard]]:
    """One optimizer whose flat shards cut the concatenation of all tensors at `cuts`, anywhere."""
    flat = torch.cat([values.flatten() for values in parts.values()])
    shards = []
    for first, last in zip([0, *cuts], [*cuts, len(flat)], strict=True):
        found, start = [], 0
        for name, values in parts.items():
            part = Part(name, values.shape, zeros, (0,) * values.dim(), values.shape, start)
            found += rectangles([part], first, last - first, 0, counted=True)
            start += values.numel()
        shards.append(Shard(flat[first:last].clone(), found))
    optimizer = Adafactor([torch.nn.Parameter(shard.weights) for shard in shards], config)
    optimizer.param_groups[0]["params"] = [shard.weights for shard in shards]
    shapes = {name: values.shape for name, values in parts.items()}
    optimizer.bind(shards, shapes, torch.distributed.group.WORLD, layouts)
    return optimizer, shards


@pytest.mark.parametrize("cuts", [[], [7], [12, 100, 101, 240, 359], [250, 300]])
@pytest.mark.parametrize("clipping", [1.0, 0.01])
def test_equals_the_plain_full_matrix_one(cuts: list[int], clipping: float) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    whole["vector"] *= 1e-5  # below `epsilon_scale`, which then scales its steps
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
    found = torch.cat([shard.weights for shard in shards]).split([values.numel() for values in expected])
    for (name, before), after, wanted in zip(whole.items(), found, expected, strict=True):
        wanted = wanted.detach().flatten()
        assert torch.linalg.vector_norm(after - wanted) <= 2e-6 * torch.linalg.vector_norm(wanted), name
        assert torch.equal(after, before.flatten()) == (name == "never_used"), name


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("clipping", [1.0, 0.01])
def test_a_tensor_that_several_ranks_hold_whole_counts_once(momentum: float, clipping: float) -> None:
    """The second shard is what another tensor-parallel rank holds of replicated tensors: sums leave it out."""
    generator = torch.Generator().manual_seed(0)
    whole = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    config = OptimizerConfig(update_clipping=clipping, momentum=momentum, min_dim_size_to_factor=3)
    alone, (one,) = make(whole, [], config)
    both, (first,) = make(whole, [], config)
    copy = Shard(first.weights.clone(), [replace(r, counted=False) for r in first.rectangles])
    both.param_groups[0]["params"].append(copy.weights)
    both.bind([first, copy], both.shapes, both.group)
    for optimizer in (alone, both):
        optimizer.set_learning_rate(1e-2)
    for _ in range(3):
        gradient = torch.randn(one.weights.shape, generator=generator)
        for shard in (one, first, copy):
            shard.weights.grad = gradient.clone()
        alone.step()
        both.step()
    assert torch.equal(first.weights, one.weights) and torch.equal(copy.weights, one.weights)


OURS = {
    "patches.embedding.weight": (96, 3072),
    "vit_block_0.mlp_in.hidden.weight": (40, 96),
    "patches.position": (49, 96),
    "classifier.classes.weight": (7, 96),
}
LAYOUTS = flax_layouts(PaLIConfig(ViTConfig(96, 1, 40, 3, 32), MT5Config(), ModelConfig()))


def in_flax(name: str, ours: Tensor) -> Tensor:
    """A view of one of our tensors in the shape and order of flax."""
    if name in LAYOUTS:
        return ours.as_strided(*zip(*LAYOUTS[name], strict=True))
    return (ours.t() if name.startswith(("vit", "class")) and ours.dim() == 2 else ours).view(recorded.SHAPES[name])


@cache
def drawn(number: int) -> dict[str, Tensor]:
    """What `recorded.drawn` returns, in our shapes and order."""
    found = {}
    for name, values in recorded.drawn(number).items():
        ours = OURS.get(name, (96, 96) if name in LAYOUTS else (values.size,))
        found[name] = torch.empty(ours)
        in_flax(name, found[name]).copy_(torch.from_numpy(values))
    return found


@pytest.mark.parametrize("cuts", [[], [5, 96 * 1000 + 17, 96 * 3072 + 96 * 20 + 7]])
@pytest.mark.parametrize("factoring", ["t5x", "big_vision"])
def test_equals_the_real_t5x_and_big_vision(factoring: str, cuts: list[int]) -> None:
    """Weights after five steps of their own code, as `record_adafactor.py` has recorded them."""
    wanted = json.loads(Path(recorded.__file__).with_name("adafactor.json").read_text(encoding="utf-8"))[factoring]
    config = OptimizerConfig(min_dim_size_to_factor=recorded.MIN_DIM, factoring=factoring)
    if factoring == "big_vision":
        config = replace(config, multiply_by_parameter_scale=False, update_clipping=None, beta2_cap=0.999)
    whole = {name: values for name, values in drawn(0).items() if name in wanted}
    optimizer, shards = make(whole, cuts, config, LAYOUTS)
    optimizer.set_learning_rate(recorded.RATE)
    for step in range(recorded.STEPS):
        flat = torch.cat([values.flatten() for name, values in drawn(1 + step).items() if name in wanted])
        for shard, piece in zip(shards, flat.split([len(s.weights) for s in shards]), strict=True):
            shard.weights.grad = piece.clone()
        optimizer.step()
    found = torch.cat([shard.weights for shard in shards]).split([values.numel() for values in whole.values()])
    for (name, before), after in zip(whole.items(), found, strict=True):
        ours = recorded.sampled(in_flax(name, after.view_as(before)).numpy())
        moved = np.abs(np.subtract(wanted[name], recorded.sampled(in_flax(name, before).numpy())))[1:].max()
        assert np.abs(np.subtract(ours, wanted[name]))[1:].max() <= 1e-5 * moved, name
        assert ours[0] == pytest.approx(wanted[name][0], rel=1e-6), name
    numbers = sum(size.numel() for grid in optimizer.grids.values() for size in grid.sizes)
    attention, patches = 3 * (96 + 3 * 96), 96 * 96 + 3072  # a mean of each row by block, and of each column by block
    assert numbers == 136 + 145 + (3 * 192 if factoring == "t5x" else attention + patches)


def test_small_sides_are_not_factored() -> None:
    """T5X factors only where both sides have at least 128 rows or columns."""
    parts = {"large": torch.ones(128, 200), "thin": torch.ones(127, 400), "bias": torch.ones(300)}
    optimizer, _ = make(parts, [], OptimizerConfig())
    assert set(optimizer.moments) == {"large"}
    assert {r.name for r in optimizer.full} == {"thin", "bias"}
    numbers = sum(values.numel() for _, _, values in optimizer.state_pieces())
    assert numbers == 128 + 200 + 127 * 400 + 300


def test_big_visions_variant_equals_the_plain_one() -> None:
    """No scaling by the weights, no update clipping, beta2 at most 0.999, a momentum kept in bf16, decoupled decay."""
    config = OptimizerConfig(
        multiply_by_parameter_scale=False,
        update_clipping=None,
        min_dim_size_to_factor=4,
        decay_exponent=2.0,
        beta2_cap=0.999,
        momentum=0.9,
        weight_decay=0.1,
    )
    generator = torch.Generator().manual_seed(0)
    whole = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    optimizer, shards = make(whole, [12, 100, 101, 240, 359], config)
    optimizer.set_learning_rate(1e-2)
    wanted = {name: values.clone() for name, values in whole.items()}
    moments = dict.fromkeys(whole, (0.0, 0.0))
    momenta = {name: torch.zeros_like(values, dtype=torch.bfloat16) for name, values in whole.items()}
    for step in range(60):  # 1 - 60^-2 is above the cap
        gradients = {name: torch.randn(values.shape, generator=generator) for name, values in whole.items()}
        flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
        for shard, piece in zip(shards, flat.split([len(s.weights) for s in shards]), strict=True):
            shard.weights.grad = piece.clone()
        optimizer.step()
        beta2 = min(0.999, 1 - (step + 1.0) ** -2)
        for name, g in gradients.items():
            squared, (rows, columns) = g.square() + 1e-30, moments[name]
            if g.dim() == 2 and min(g.shape) >= 4:
                rows = beta2 * rows + (1 - beta2) * squared.mean(1)
                columns = beta2 * columns + (1 - beta2) * squared.mean(0)
                update = g / (rows / rows.mean()).sqrt()[:, None] / columns.sqrt()
            else:
                rows = beta2 * rows + (1 - beta2) * squared
                update = g / rows.sqrt()
            moments[name] = rows, columns
            mean = 0.9 * momenta[name].float() + 0.1 * update
            momenta[name] = mean.bfloat16()
            wanted[name] -= 1e-2 * (mean + (0.1 * wanted[name] if g.dim() == 2 else 0.0))
    found = torch.cat([shard.weights for shard in shards])
    expected = torch.cat([values.flatten() for values in wanted.values()])
    assert torch.linalg.vector_norm(found - expected) <= 1e-5 * torch.linalg.vector_norm(expected)
    assert {values.dtype for name, _, values in optimizer.state_pieces() if name.endswith("momentum")} == {
        torch.bfloat16
    }


def test_the_state_of_mt5_xxl_takes_22_mb_and_that_of_pali_17b_40() -> None:
    """5.4 M floats beside 12.9 G parameters (no momentum, factored from 128 rows and columns)."""
    pali = plan_on_meta(*read_model(["model=pali_17b"]))
    shapes = {part.name: part.shape for _, part in parameter_parts(pali)}
    own = ("bridge.embedding", "bridge.encoder_bias", "bridge.decoder_bias", "encoder", "decoder", "head")
    language = {name: shape for name, shape in shapes.items() if name.startswith(own)}
    assert sum(shape.numel() for shape in language.values()) == pytest.approx(12.92e9, rel=1e-3)
    assert state_bytes(language, OptimizerConfig()) / 1e6 == pytest.approx(21.7, abs=0.3)
    assert state_bytes(shapes, OptimizerConfig()) / 1e6 == pytest.approx(40.2, abs=0.1)


def test_the_size_of_a_state_is_what_it_takes() -> None:
    whole = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    for momentum in (0.0, 0.9):
        config = OptimizerConfig(min_dim_size_to_factor=4, momentum=momentum)
        optimizer, _ = make(whole, [], config)
        found = sum(values.nbytes for _, _, values in optimizer.state_pieces())
        assert found == state_bytes({name: values.shape for name, values in whole.items()}, config)
