"""Copies of parameters: gradients are joined over tensor-parallel ranks, and replicas are compared bit by bit."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.layers import ParameterInfo, describe_parameter
from parallel.engine.base import Engine, bits_sum
from parallel.engine.replicated import ReplicatedEngine
from parallel.layout import Layout
from tests.unit.train.ranks import Ranks


def next_bit(x: Tensor) -> Tensor:
    integer = {2: torch.int16, 4: torch.int32}[x.element_size()]
    changed = x.clone()
    changed.view(integer).view(-1)[-1] += 1
    return changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_bit_changes_the_hash(dtype: torch.dtype) -> None:
    x = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert bits_sum(x) == bits_sum(x.clone()) != bits_sum(next_bit(x))
    nan = torch.full((3,), torch.nan, dtype=dtype)
    assert bits_sum(nan) == bits_sum(nan.clone()) != bits_sum(next_bit(nan))


@pytest.mark.parametrize("parted", [None, "1.weight", "fp32 weights 0"])
def test_a_parted_parameter_is_named_on_all_ranks(parted: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).bfloat16()
    ranks = Ranks(3, monkeypatch)

    def find(rank: int) -> str | None:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).bfloat16()
        model.load_state_dict(first.state_dict())
        copies = [torch.ones(5)]
        if rank == 2 and parted == "1.weight":
            model[1].weight.data = next_bit(first[1].weight.detach())  # type: ignore[union-attr, arg-type]
        if rank == 2 and parted == "fp32 weights 0":
            copies = [next_bit(copies[0])]
        layout: Any = SimpleNamespace(config=SimpleNamespace(zero_stage=0), world_size=3, data_parallel_size=3,
                                      data_group=None, device=torch.device("cpu"))  # fmt: skip
        for name in ("all_reduce_data", "any_rank", "gather_objects"):
            setattr(layout, name, getattr(Layout, name).__get__(layout))
        return Engine.parted_parameter(SimpleNamespace(layout=layout, model=model, copied_weights=lambda: copies))  # type: ignore[arg-type]

    assert ranks.run(find) == [parted] * 3


def test_gradients_of_copies_are_joined_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial ones are summed in fp32; of whole ones every rank takes those of rank 0; split ones are left alone."""
    whole = torch.tensor([0.1, 0.7])
    partial = torch.tensor([1.0, 2.0**-9], dtype=torch.bfloat16)
    ranks = Ranks(2, monkeypatch)
    reduce = dist.all_reduce

    def all_reduce(x: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        assert x.dtype == torch.float32
        reduce(x, op, group)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)

    def join(rank: int) -> list[Tensor]:
        trained = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
        for p, info in zip(trained, (ParameterInfo((), split=True), ParameterInfo((), split=False),
                                     ParameterInfo((), split=False, partial_gradient=True)), strict=True):  # fmt: skip
            describe_parameter(p, info)
        gradients = [torch.full((2,), float(rank)), next_bit(whole) if rank else whole, partial[rank].expand(2)]
        group: Any = SimpleNamespace(size=lambda: 2)
        layout = SimpleNamespace(tensor_group=group, tensor_parallel_rank=rank)
        ReplicatedEngine._join_copies(SimpleNamespace(trained=trained, layout=layout), gradients)  # type: ignore[arg-type]
        return gradients

    for rank, found in enumerate(ranks.run(join)):
        assert isinstance(found, list), found
        split, taken, summed = found
        assert split.tolist() == [rank] * 2 and torch.equal(taken, whole)
        assert summed.tolist() == [1.0 + 2.0**-9] * 2
    assert ranks.calls == {"all_reduce": 1}
