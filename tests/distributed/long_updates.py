"""Many updates on given gradients: by an engine's optimizer on its shards, and on whole matrices by transformers'
Adafactor or torch's AdamW."""

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from transformers.optimization import Adafactor as PlainAdafactor

from model.layers import parameter_parts
from model.pali import build
from parallel.config import OptimizerConfig
from parallel.engine.base import Engine
from parallel.optimizer.adafactor import means
from parallel.shards import Rectangle
from tests.distributed.problem import EPSILON, LEARNING_RATES, MODEL, PALI, weights

NUM_GRADIENTS = 10
FACTOR_FROM = 16  # sides; from 128 on, as by default, no matrix that tensor-parallel ranks replicate would be factored


def num_updates(ranks: int) -> int:
    """Of a world: in large ones fewer, because each rank takes as long for an update as a rank of a small one."""
    return 100 if ranks <= 4 else 25


@cache
def shapes(image_size: int, bias_per_layer: bool = False) -> dict[str, torch.Size]:
    mt5, model = replace(PALI.mt5, bias_per_layer=bias_per_layer), replace(MODEL, image_size=image_size)
    return {part.name: part.shape for _, part in parameter_parts(build(replace(PALI, mt5=mt5, model=model)))}


@cache
def drawn(seed: int, *sizes: int) -> dict[str, Tensor]:
    """Normal values for every logical tensor: the first weights, or one of the gradients that come in turns.

    `sizes`: as `shapes` takes them.
    """
    wanted = shapes(*sizes)
    flat = torch.randn(sum(shape.numel() for shape in wanted.values()), generator=torch.Generator().manual_seed(seed))
    pieces = flat.split([shape.numel() for shape in wanted.values()])
    return {name: piece.view(shape) for (name, shape), piece in zip(wanted.items(), pieces, strict=True)}


@cache
def plain(kind: str, number: int, *sizes: int) -> dict[str, Tensor]:
    """Transformers' Adafactor factors every matrix; what T5X does not factor, it is given as a vector."""
    config, rate = OptimizerConfig(min_dim_size_to_factor=FACTOR_FROM), LEARNING_RATES[kind]

    def as_given(name: str, values: Tensor) -> Tensor:
        return values.clone() if means(found[name].shape, config) else values.flatten().clone()

    found = drawn(0, *sizes)
    given = {name: as_given(name, values).requires_grad_() for name, values in found.items()}
    gradients = [drawn(1 + number, *sizes) for number in range(NUM_GRADIENTS)]
    optimizer: torch.optim.Optimizer
    if kind == "adafactor":
        optimizer = PlainAdafactor(given.values(), lr=rate, relative_step=False, scale_parameter=True)
    else:
        betas = (config.beta1, config.beta2)
        optimizer = torch.optim.AdamW(given.values(), rate, betas, EPSILON, weight_decay=0.0)
    for step in range(number):
        for name, values in given.items():
            values.grad = as_given(name, gradients[step % NUM_GRADIENTS][name])
        optimizer.step()
    return {name: values.detach().view(found[name].shape) for name, values in given.items()}


def sharded(engine: Engine, *sizes: int) -> dict[str, Tensor]:
    """The engine's: every logical weight, gathered from all ranks, frozen ones as they were. It ends the training."""
    optimizer = engine.optimizer
    optimizer.config = replace(optimizer.config, min_dim_size_to_factor=FACTOR_FROM)
    optimizer.bind(optimizer.shards, optimizer.shapes, optimizer.group)  # forgets the steps taken
    optimizer.param_groups[0]["params"] = [shard.weights for shard in optimizer.shards]
    optimizer.set_learning_rate(LEARNING_RATES[optimizer.config.name])

    def laid_out(whole: dict[str, Tensor]) -> list[Tensor]:
        flats = [torch.zeros_like(shard.weights, dtype=torch.float32) for shard in optimizer.shards]
        for shard, flat in zip(optimizer.shards, flats, strict=True):
            for r in shard.rectangles:
                r.view(flat).copy_(_piece(whole[r.name], r))
        return flats

    with torch.no_grad():
        for shard, values in zip(optimizer.shards, laid_out(drawn(0, *sizes)), strict=True):
            shard.weights.copy_(values)
    gradients = [laid_out(drawn(1 + number, *sizes)) for number in range(NUM_GRADIENTS)]
    for step in range(num_updates(engine.layout.world_size)):
        for shard, gradient in zip(optimizer.shards, gradients[step % NUM_GRADIENTS], strict=True):
            shard.weights.grad = gradient
        optimizer.step()
    return weights(engine)


def _piece(whole: Tensor, r: Rectangle) -> Tensor:
    return whole[tuple(slice(o, o + n) for o, n in zip(r.offset, r.size, strict=True))]
