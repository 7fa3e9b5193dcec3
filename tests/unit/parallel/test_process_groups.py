"""Which ranks form groups, how many groups a world makes, and that warming them up blocks nobody."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.parallel_state import RankGenerator
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel import process_groups
from parallel.config import ParallelConfig
from parallel.process_groups import (
    ReadingGroups,
    end_groups,
    group_ranks,
    start_groups,
    start_reading_groups,
    sum_over,
    warm_up,
)

DEGREES = [(1, 1, 4), (2, 1, 2), (1, 4, 1), (2, 2, 2), (4, 2, 3), (2, 3, 4), (8, 1, 1)]  # tensor, pipeline, data
MEGATRON = {"tensor": "tp", "pipeline": "pp", "data": "dp", "model": "tp-pp", "stage": "tp-dp"}


@pytest.mark.parametrize(("tensor", "pipeline", "data"), DEGREES)
def test_ranks_are_ordered_as_megatron_orders_them(tensor: int, pipeline: int, data: int) -> None:
    found = group_ranks(ParallelConfig(tensor=tensor, pipeline=pipeline), tensor * pipeline * data)
    megatron = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=1, order="tp-cp-ep-dp-pp")
    for kind, token in MEGATRON.items():
        assert sorted(found[kind]) == sorted(map(tuple, megatron.get_ranks(token))), kind


@pytest.fixture
def fresh_world() -> Iterator[None]:
    before = dist.is_initialized()
    if before:
        dist.destroy_process_group()
    yield
    end_groups()
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("parallel", "calls", "own"),
    [
        ({"tensor": 4}, 256 + 4 + 1, 3),  # tensor = replica, data, this rank alone; a stage is the world
        ({"tensor": 8, "pipeline": 4}, 128 + 256 + 32 + 32 + 4, 5),
        ({}, 1, 1),  # data and stage are the world; one group for this rank alone
    ],
    ids=str,
)
def test_a_thousand_ranks_make_only_the_groups_that_they_use(
    parallel: dict[str, int], calls: int, own: int, monkeypatch: pytest.MonkeyPatch, fresh_world: None
) -> None:
    """megatron-core 0.16.1 calls `new_group` 6,671 times for tensor=4, and 17 of these groups have this rank."""
    config = ParallelConfig(**parallel)
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=1024)
    monkeypatch.setattr(process_groups, "device_backend", lambda: "fake")
    made: list[tuple[tuple[int, ...], str | None]] = []
    new_group = dist.new_group

    def counting(ranks: tuple[int, ...], timeout: Any, backend: str | None, **options: Any) -> Any:
        made.append((ranks, backend))
        return new_group(ranks, timeout, backend, **options)

    monkeypatch.setattr(dist, "new_group", counting)
    groups = start_groups(config, 5, 1024)
    mine = [(ranks, backend) for ranks, backend in made if 5 in ranks]
    assert (len(made), len(mine)) == (calls, own)
    peers = sum(len(ranks) - 1 for ranks, backend in mine if backend is None)  # these have the world's backends: gloo
    assert peers == config.replica_size - 1
    assert groups["model"].size() == config.replica_size and groups["model"].rank() == 5 % config.tensor
    for kind, lists in group_ranks(config, 1024).items():
        assert dist.get_process_group_ranks(groups[kind]) == list(next(ranks for ranks in lists if 5 in ranks))


@pytest.mark.parametrize(
    ("parallel", "rank", "calls", "peers"),
    [
        ({"tensor": 4}, 5, 256 + 1, [3]),
        ({"tensor": 4}, 8, 256 + 1, [3, 255]),
        ({}, 5, 1, [1023]),  # every rank leads a replica of its own
    ],
    ids=str,
)
def test_reading_ahead_has_groups_of_the_replica_and_of_all_leaders(
    parallel: dict[str, int],
    rank: int,
    calls: int,
    peers: list[int],
    monkeypatch: pytest.MonkeyPatch,
    fresh_world: None,
) -> None:
    config = ParallelConfig(**parallel)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=1024)
    made: list[tuple[int, ...]] = []
    new_group = dist.new_group

    def counting(ranks: Sequence[int], timeout: Any, backend: str) -> Any:
        assert backend == "gloo"
        made.append(tuple(ranks))
        return new_group(list(ranks), timeout, "fake")

    monkeypatch.setattr(dist, "new_group", counting)
    alone: Any = object()
    leads = rank % config.replica_size == 0
    own = ReadingGroups(alone, alone if leads else None)
    replica, leaders = start_reading_groups(config, rank, 1024, own)
    assert len(made) == calls and [len(ranks) - 1 for ranks in made if rank in ranks] == peers
    assert (replica is alone) == (config.replica_size == 1)
    assert (leaders is not None) == leads
    if leaders is not None:
        assert dist.get_process_group_ranks(leaders) == list(range(0, 1024, config.replica_size))


@dataclass(eq=False)
class Group:
    """The members of a group, as one rank sees it."""

    ranks: tuple[int, ...]
    own: int

    def size(self) -> int:
        return len(self.ranks)

    def rank(self) -> int:
        return self.ranks.index(self.own)


def calls_of_rank(rank: int, parallel: ParallelConfig, world: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """(ranks that must come together, kind) of each call of a rank's warm-up, in its order."""
    calls: list[Any] = []
    everyone = Group(tuple(range(world)), rank)
    groups, by_ranks = {}, {everyone.ranks: everyone}
    for kind, lists in group_ranks(parallel, world).items():
        ranks = next(ranks for ranks in lists if rank in ranks)
        groups[kind] = by_ranks.setdefault(ranks, Group(ranks, rank))
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=everyone))
    monkeypatch.setattr(
        dist, "all_reduce", lambda x, group=None: calls.append(((group or everyone).ranks, "all_reduce"))
    )
    monkeypatch.setattr(
        dist, "send", lambda x, group, group_dst: calls.append(((rank, group.ranks[group_dst]), "message"))
    )
    monkeypatch.setattr(
        dist, "recv", lambda x, group, group_src: calls.append(((group.ranks[group_src], rank), "message"))
    )
    warm_up(groups, torch.device("cpu"))  # type: ignore[arg-type]
    return calls


@pytest.mark.parametrize(("tensor", "pipeline", "data"), DEGREES)
def test_warming_up_ends_where_every_call_waits_for_all_members(
    tensor: int, pipeline: int, data: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parallel, world = ParallelConfig(tensor=tensor, pipeline=pipeline), tensor * pipeline * data
    left = {rank: calls_of_rank(rank, parallel, world, monkeypatch) for rank in range(world)}
    made = {call for calls in left.values() for call in calls}
    wanted = {ranks for groups in group_ranks(parallel, world).values() for ranks in groups if len(ranks) > 1}
    assert {ranks for ranks, kind in made if kind == "all_reduce"} == wanted | {tuple(range(world))}
    while any(left.values()):
        ready = [calls[0] for calls in left.values() if calls]
        moved = [call for call in set(ready) if all(left[rank] and left[rank][0] == call for rank in call[0])]
        assert moved, f"all ranks wait: {ready}"
        for call in moved:
            for rank in call[0]:
                left[rank].pop(0)


def test_a_tensor_of_the_host_is_summed_on_the_device_where_a_group_has_no_gloo(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where: list[torch.device] = []

    def all_reduce(x: torch.Tensor, group: Any) -> None:
        where.append(x.device)
        x.mul_(2)

    group: Any = SimpleNamespace(_device_types=[torch.device("meta")])
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    host, moved = torch.ones(3), torch.ones(3)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: moved if device == torch.device("meta") else self)
    sum_over(host, group)
    assert moved.tolist() == [2.0] * 3 and host.tolist() == [2.0] * 3
    group._device_types = [torch.device("cpu")]
    moved.zero_()
    sum_over(host, group)
    assert host.tolist() == [4.0] * 3 and len(where) == 2
