"""Recomputation marks the chosen blocks, keeps less the more there are, and changes no gradient."""

import pytest
import torch
from torch import Tensor

from common.errors import ConfigurationError
from model.pali import PaLI, build
from parallel.config import ParallelConfig
from parallel.plan.recompute import mark_recomputed
from tests.distributed.problem import PALI, micro_batches


def kept_and_gradients(config: ParallelConfig) -> tuple[int, dict[str, Tensor]]:
    """Bytes that autograd keeps for the backward pass, and what that pass gives."""
    pali, batch = build(PALI), micro_batches(0)[0]
    mark_recomputed(pali.units(), config)
    seen: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.setdefault(x.data_ptr(), x.nbytes) and x, lambda x: x):
        loss = pali((), batch).loss
    loss.backward()
    return sum(seen.values()), {name: p.grad for name, p in pali.named_parameters() if p.grad is not None}


def test_keeps_less_and_changes_nothing() -> None:
    configs = {
        name: ParallelConfig(recompute=name, recompute_stacks=list(stacks))
        for name, stacks in [("none", []), ("attention", ["encoder", "decoder"]), ("every_n", ["vit", "decoder"])]
    } | {name: ParallelConfig(recompute=name) for name in ("block", "mlp", "norm", "elementwise")}
    kept, gradients = zip(*map(kept_and_gradients, configs.values()), strict=True)
    bytes_of = dict(zip(configs, kept, strict=True))
    assert bytes_of["block"] < bytes_of["every_n"] < bytes_of["none"]
    assert bytes_of["block"] < bytes_of["attention"] < bytes_of["none"]
    assert bytes_of["block"] < bytes_of["elementwise"] < min(bytes_of["mlp"], bytes_of["norm"])
    assert max(bytes_of["mlp"], bytes_of["norm"]) < bytes_of["none"]
    for found in gradients[1:]:
        assert all(torch.equal(found[name], gradient) for name, gradient in gradients[0].items())


def marked(pali: PaLI, **options: object) -> set[str]:
    mark_recomputed(pali.units(), ParallelConfig(**options))  # type: ignore[arg-type]
    return {name for name, unit in pali.units() if unit.recompute != "none"}


def test_marks_the_chosen_blocks() -> None:
    def fresh() -> PaLI:
        return build(PALI)

    blocks = {f"{stack}_block_{i}" for stack in ("vit", "encoder", "decoder") for i in (0, 1)}
    assert marked(fresh()) == set()
    assert marked(fresh(), recompute="attention") == blocks
    assert marked(fresh(), recompute="block", recompute_stacks=["encoder"]) == {"encoder_block_0", "encoder_block_1"}
    assert marked(fresh(), recompute="every_n", recompute_every=2) == {name for name in blocks if name.endswith("0")}


def test_an_unknown_policy_or_stack_is_one_sentence() -> None:
    with pytest.raises(ConfigurationError, match="choose none, block, every_n, attention, mlp, norm or elementwise"):
        ParallelConfig(recompute="full")
    with pytest.raises(ConfigurationError, match=r"recompute_stacks='bridge' is unknown; choose vit, encoder or"):
        ParallelConfig(recompute_stacks=["bridge"])
