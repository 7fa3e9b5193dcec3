"""Tensor parallelism, with and without sequence parallelism, changes nothing: losses, every gradient, generation."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.world import run_world
from model.batch import MicroBatch
from model.generation import generate, score
from model.layers import parameter_info, parameter_parts
from model.pali import PaLI, freeze, local_block, units
from model.tensor_parallel import TensorParallel
from model.weights import load, logical_tensors
from parallel.config import ParallelConfig
from parallel.distributed import launch
from parallel.layout import Layout
from tests.unit.model.examples import (
    MODEL,
    PALI,
    example,
    gradients,
    largest_error,
    micro_batch,
    relative_error,
    small_model,
)

TOLERANCE = 1e-5
ODD = 12  # pixels: 9 visual tokens, which neither 2 nor 4 ranks can divide
FROZEN_VIT = ["patches.*", "vit_block_*", "bridge.vit_norm.*"]


@pytest.mark.parametrize("size", [2, 4])
def test_any_tensor_parallel_size_equals_one(size: int) -> None:
    run_world(size, _all_checks, size)


def _all_checks(size: int) -> None:
    model = replace(MODEL, z_loss=1e-2, dropout_rate=0.1)
    reference = small_model(model=model)
    for sequence in (False, True):
        tensor_parallel = Layout.start(ParallelConfig(tensor=size, sequence=sequence), launch()).tensor_parallel
        for frozen in ([], FROZEN_VIT, ["*_block_*_in.weight"]):
            for parameter in reference.parameters():
                parameter.requires_grad_(True)
            parallel = PaLI(units(replace(PALI, model=model), tensor_parallel))
            load(parallel, logical_tensors(reference))
            for either in (reference, parallel):
                freeze(either, frozen)
            for batch in _batches():
                _check_training(parallel, reference, batch, tensor_parallel)
        _check_recomputation(parallel, tensor_parallel)
        _check_two_stages(parallel, tensor_parallel)
        _check_generation(parallel, reference, tensor_parallel)
        _check_odd_images(tensor_parallel)


def _check_odd_images(tensor_parallel: TensorParallel) -> None:
    """Visual tokens that sequence parallelism cannot divide; also where no row has an image."""
    model = replace(MODEL, image_size=ODD)
    reference = small_model(model=model)
    parallel = PaLI(units(replace(PALI, model=model), tensor_parallel))
    load(parallel, logical_tensors(reference))
    for frozen in ([], FROZEN_VIT):
        for either in (reference, parallel):
            freeze(either, frozen)
        for batch in _batches(ODD):
            _check_training(parallel, reference, batch, tensor_parallel)
    _check_generation(parallel, reference, tensor_parallel, ODD)


def _batches(image_size: int = MODEL.image_size) -> list[MicroBatch]:
    """Packed rows with several images and text alone; and rows without any image. Lengths divide by 4."""
    mixed = [[example(1), example(2, images=0, inputs=9)], [example(3, images=2), example(4, targets=9)]]
    text = [[example(5, images=0)], [example(6, images=0), example(7, images=0)]]
    batches = micro_batch(mixed, 60, 20, 0, image_size), micro_batch(text, 20, 16, 2, image_size)
    return [batch.seeded(number) for number, batch in enumerate(batches)]


def _check_training(parallel: PaLI, reference: PaLI, batch: MicroBatch, tensor_parallel: TensorParallel) -> None:
    reference.train().zero_grad()
    expected_loss, expected_totals, _ = reference((), batch, loss_scale=1 / batch.num_targets)
    expected_loss.backward()
    loss, totals = _step(parallel, batch)
    assert relative_error(loss, expected_loss) < TOLERANCE
    torch.testing.assert_close(totals, expected_totals, rtol=TOLERANCE, atol=1e-6)

    whole = gradients(reference)
    ours, theirs = {}, {}
    for parameter, part in parameter_parts(parallel):
        assert (parameter.grad is None) == (part.name not in whole), part.name
        if parameter.grad is None:
            continue
        block = tuple(slice(start, start + count) for start, count in zip(part.offset, part.block, strict=True))
        ours[part.name] = local_block(_summed(parameter, tensor_parallel), part)
        theirs[part.name] = whole[part.name][block]
    error, name = largest_error(ours, theirs)
    assert error < TOLERANCE, f"{name}: {error:.1e} with sequence={tensor_parallel.sequence}"


def _step(model: PaLI, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    model.train().zero_grad()
    loss, totals, _ = model((), batch, loss_scale=1 / batch.num_targets)
    loss.backward()
    return loss, totals


def _summed(parameter: Tensor, tensor_parallel: TensorParallel) -> Tensor:
    """The gradient; over the group, where each rank has seen its part of the sequence alone."""
    assert parameter.grad is not None
    gradient = parameter.grad.clone()
    if parameter_info(parameter).partial_gradient:
        dist.all_reduce(gradient, group=tensor_parallel.group)
    return gradient


def _check_recomputation(parallel: PaLI, tensor_parallel: TensorParallel) -> None:
    batch = _batches()[0]
    _step(parallel, batch)
    expected = {name: p.grad.clone() for name, p in parallel.named_parameters() if p.grad is not None}
    for recompute in ("elementwise", "block"):
        for name, unit in parallel.units():
            unit.recompute = recompute if "_block_" in name else "none"
        _step(parallel, batch)
        for name, parameter in parallel.named_parameters():
            if name in expected:
                where = f"{name} with sequence={tensor_parallel.sequence}, recompute={recompute}"
                assert torch.equal(parameter.grad, expected[name]), where


def _check_two_stages(parallel: PaLI, tensor_parallel: TensorParallel) -> None:
    """Decoder blocks on both sides of a pipeline's cut: each side gathers the encoder's output by itself."""
    batch, names = _batches()[0], [name for name, _ in parallel.units()]
    _step(parallel, batch)
    expected = {name: p.grad.clone() for name, p in parallel.named_parameters() if p.grad is not None}
    parallel.zero_grad()
    cut = names.index("decoder_block_1")
    sent = parallel((), batch, names[:cut])
    received = tuple(x.detach().requires_grad_(x.requires_grad) for x in sent)
    parallel(received, batch, names[cut:], 1 / batch.num_targets).loss.backward()
    pairs = [(x, y.grad) for x, y in zip(sent, received, strict=True) if y.grad is not None]
    torch.autograd.backward(*zip(*pairs, strict=True))
    found = {name: p.grad for name, p in parallel.named_parameters() if p.grad is not None}
    error, name = largest_error(found, expected)
    assert error < TOLERANCE, f"{name}: {error:.1e} with sequence={tensor_parallel.sequence}"


def _check_generation(
    parallel: PaLI, reference: PaLI, tensor_parallel: TensorParallel, image_size: int = MODEL.image_size
) -> None:
    """Prompts of several lengths, all of them undivided by sequence parallelism while decoding."""
    rows = [[example(seed, inputs=length)] for seed, length in enumerate((5, 2, 12))]
    batch = micro_batch(rows, 28, 1, image_size=image_size)
    expected = generate(reference, batch, 11)
    for together in (None, tensor_parallel.group):
        assert torch.equal(generate(parallel, batch, 11, together), expected)
    for search in ({"num_beams": 3}, {"temperature": 1.0, "top_p": 0.9, "seed": 1}):
        assert torch.equal(generate(parallel, batch, 11, **search), generate(reference, batch, 11, **search))
    texts = [[[3, 7, 1], [5, 1]]] * 3
    assert torch.allclose(score(parallel, batch, texts), score(reference, batch, texts), rtol=1e-5)
    assert parallel.bridge.parallel.sequence == tensor_parallel.sequence, "sequence parallelism is on again"
