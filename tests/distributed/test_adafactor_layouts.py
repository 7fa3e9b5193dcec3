"""Adafactor on flat ZeRO shards of tensor-parallel blocks is the plain one on whole matrices, step after step."""

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.optimization import Adafactor as ReferenceAdafactor

from model.layers import Part, zeros
from parallel.adafactor import Adafactor
from parallel.config import OptimizerConfig
from parallel.fragments import Rectangle, rectangles
from parallel.launch import launch, start
from parallel.optimizer import Shard
from tests.distributed.world import run_world

RANKS, STEPS = 4, 100
LAYOUTS = [(1, 4), (2, 2), (4, 1)]  # tensor x data
SPLIT = {"rows": (0, (16, 20)), "columns": (1, (12, 24)), "tall": (0, (40, 3)), "vector": (None, (17,))}
RATE = 1e-2


def local_part(name: str, tensor_rank: int, tensor: int, start: int) -> Part:
    """This rank's block, split along rows or columns, or whole."""
    dimension, shape = SPLIT[name]
    block, offset = list(shape), [0] * len(shape)
    if dimension is not None:
        block[dimension] //= tensor
        offset[dimension] = tensor_rank * block[dimension]
    return Part(name, torch.Size(shape), zeros, tuple(offset), torch.Size(block), start)


def piece(whole: Tensor, r: Rectangle) -> Tensor:
    return whole[tuple(slice(o, o + n) for o, n in zip(r.offset, r.size, strict=True))]


def in_every_layout() -> None:
    start(launch(), 120)
    for tensor, data in LAYOUTS:
        tensor_rank, data_rank = dist.get_rank() % tensor, dist.get_rank() // tensor
        parts: list[Part] = []
        for name in SPLIT:
            at = parts[-1].start + parts[-1].block.numel() if parts else 0
            parts.append(local_part(name, tensor_rank, tensor, at))
        length = -(-(parts[-1].start + parts[-1].block.numel()) // data)  # of a data-parallel rank's shard
        held: list[Rectangle] = []
        for part in parts:
            once = SPLIT[part.name][0] is not None or tensor_rank == 0
            held += rectangles([part], data_rank * length, length, 0, once)

        generator = torch.Generator().manual_seed(0)
        whole = {name: torch.randn(shape, generator=generator) for name, (_, shape) in SPLIT.items()}
        flat = torch.zeros(length)
        for r in held:
            r.view(flat).copy_(piece(whole[r.name], r))
        optimizer = Adafactor([torch.nn.Parameter(flat)], OptimizerConfig(min_dim_size_to_factor=1))
        optimizer.param_groups[0]["params"] = [flat]
        optimizer.bind([Shard(flat, held)], {name: x.shape for name, x in whole.items()}, dist.group.WORLD)
        optimizer.set_learning_rate(RATE)

        expected = {name: values.clone().requires_grad_() for name, values in whole.items()}
        reference = ReferenceAdafactor(expected.values(), lr=RATE, relative_step=False, scale_parameter=True)
        for _ in range(STEPS):
            flat.grad = torch.zeros(length)
            for values in expected.values():
                values.grad = torch.randn(values.shape, generator=generator)
            for r in held:
                r.view(flat.grad).copy_(piece(expected[r.name].grad, r))
            reference.step()
            optimizer.step()
        for r in held:
            wanted = piece(expected[r.name].detach(), r)
            off = torch.linalg.vector_norm(r.view(flat) - wanted) / torch.linalg.vector_norm(expected[r.name].detach())
            assert off <= 1e-6, f"tensor={tensor} data={data} {r}: {off}"
            assert not torch.equal(wanted, piece(whole[r.name], r))


def test_a_hundred_steps_in_every_layout() -> None:
    run_world(RANKS, in_every_layout)
