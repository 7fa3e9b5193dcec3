"""The model's path on a GPU, with `meta` in its place: no host tensor in an operator, and no wait for the device."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from model.pali import PaLI, freeze, units
from model.tensor_parallel import TensorParallel
from tests.unit.gpu_on_meta import META, Waits, fake_group
from tests.unit.model.examples import MODEL, PALI, example, micro_batch

FROZEN_VIT = ["patches.*", "vit_block_*", "bridge.vit_norm.*"]


@pytest.mark.parametrize(
    ("attention", "tensor", "sequence", "recompute", "dropout_rate", "frozen"),
    [
        ("flex", 1, False, "none", 0.0, []),
        ("flex", 2, True, "block", 0.0, FROZEN_VIT),
        ("flex", 2, False, "attention", 0.1, FROZEN_VIT),
        ("sdpa", 1, False, "elementwise", 0.1, FROZEN_VIT),
        ("plain", 1, False, "attention", 0.1, []),
        ("plain", 2, True, "elementwise", 0.1, []),
        ("plain", 2, False, "block", 0.1, FROZEN_VIT),
    ],
)
def test_a_micro_batch_never_waits(
    waits: Waits,
    attention: str,
    tensor: int,
    sequence: bool,
    recompute: str,
    dropout_rate: float,
    frozen: Sequence[str],
) -> None:
    """Packed rows, several images a row, a row of text alone."""
    rows = [[example(1), example(2, images=0)], [example(3, images=2)]]
    batch = micro_batch(rows, 60, 20).to(META)
    model = replace(MODEL, attention=attention, dropout_rate=dropout_rate)
    with torch.device(META):
        pali = PaLI(units(replace(PALI, model=model), TensorParallel(fake_group(0, tensor), sequence))).bfloat16()
    freeze(pali, frozen)
    for name, unit in pali.units():
        unit.recompute = recompute if "_block_" in name else "none"
    waits.lines.clear()
    pali.train()
    output = pali((), batch, loss_scale=0.5)
    output.loss.backward()
    assert waits.lines == {}
    trained = {name for name, p in pali.named_parameters() if p.requires_grad}
    assert {name for name, p in pali.named_parameters() if p.grad is not None} == trained
