"""Make the process groups of a layout: each set of ranks once, only those that are used, and gloo only where it sends.

Tensors on a GPU go through NCCL. Objects and pixels are on the host, so the world and each replica (`model`) have gloo
beside NCCL: every rank of a gloo group connects to every other one, which the large groups could not afford.
"""

from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model.megatron import parallel_state
from parallel.config import ParallelConfig

HOST_KINDS = ("model",)  # groups that send tensors of the host too, besides the world

_started: list[dist.ProcessGroup] = []  # those of the layout of this process


def group_ranks(parallel: ParallelConfig, world_size: int) -> dict[str, list[tuple[int, ...]]]:
    """Return the ranks of all groups of each kind: tensor-parallel ranks are adjacent, then data, then the pipeline.

    `model` is a replica (tensor x pipeline ranks), `stage` holds a pipeline stage (tensor x data ranks). All ranks
    return the same kinds and groups in the same order.
    """
    tensor, pipeline = parallel.tensor, parallel.pipeline
    ranks = torch.arange(world_size).view(pipeline, -1, tensor)
    kinds = {
        "tensor": ranks.reshape(-1, tensor),
        "pipeline": ranks.permute(1, 2, 0).reshape(-1, pipeline),
        "data": ranks.transpose(1, 2).reshape(pipeline * tensor, -1),
        "model": ranks.transpose(0, 1).reshape(-1, pipeline * tensor),
        "stage": ranks.reshape(pipeline, -1),
    }
    return {kind: [tuple(group) for group in groups.tolist()] for kind, groups in kinds.items()}


def start_groups(parallel: ParallelConfig, rank: int, world_size: int) -> dict[str, dist.ProcessGroup]:
    """Start this rank's group of every kind; a collective of the world, which has started.

    Kinds with the same ranks share one group, which may be that of the world. Groups of an earlier layout end.
    """
    end_groups()
    kinds = group_ranks(parallel, world_size)
    with_host = {ranks for kind in HOST_KINDS for ranks in kinds[kind]}
    timeout = timedelta(seconds=parallel.timeout_s)
    assert dist.group.WORLD is not None
    made: dict[tuple[int, ...], dist.ProcessGroup] = {tuple(range(world_size)): dist.group.WORLD}
    for ranks in (ranks for groups in kinds.values() for ranks in groups):
        alone = len(ranks) == 1
        if ranks not in made and (not alone or ranks == (rank,)):
            backend = None if ranks in with_host else device_backend()
            made[ranks] = dist.new_group(ranks, timeout, backend, use_local_synchronization=alone)
            if rank in ranks:
                _started.append(made[ranks])
    parallel_state._set_global_memory_buffer()  # Megatron gathers sequences into it
    return {kind: next(made[ranks] for ranks in groups if rank in ranks) for kind, groups in kinds.items()}


def start_background_group(timeout_s: float) -> dist.ProcessGroup:
    """Start a second group of the whole world, on gloo, for a thread beside training; a collective of the world."""
    group = dist.new_group(timeout=timedelta(seconds=timeout_s), backend="gloo")
    _started.append(group)
    return group


class ReadingGroups(NamedTuple):
    """The groups in which ranks exchange the rows that they read."""

    replica: dist.ProcessGroup
    """All ranks of a replica, its leader first."""
    leaders: dist.ProcessGroup | None
    """The leaders of all replicas; None on the other ranks."""


def start_reading_groups(parallel: ParallelConfig, rank: int, world_size: int, own: ReadingGroups) -> ReadingGroups:
    """Start groups of the same ranks as `own`, on gloo, for a thread beside training; a collective of the world.

    A group of one rank needs no second one.
    """
    replicas, timeout = group_ranks(parallel, world_size)["model"], timedelta(seconds=parallel.timeout_s)
    replica, leaders = own
    for ranks in replicas if len(replicas[0]) > 1 else ():
        group = dist.new_group(ranks, timeout, "gloo")
        if rank in ranks:
            replica = group
            _started.append(group)
    if len(replicas) > 1:
        group = dist.new_group([ranks[0] for ranks in replicas], timeout, "gloo")
        if leaders is not None:
            leaders = group
            _started.append(group)
    return ReadingGroups(replica, leaders)


def device_backend() -> str | None:
    """Return the backend of groups that send tensors of the device alone; None where it is the world's."""
    return "nccl" if "cuda:nccl" in str(dist.get_backend_config()) else None


def sum_over(x: Tensor, group: dist.ProcessGroup) -> None:
    """Sum `x` in place over a group; a collective of it. A tensor of the host crosses the device where NCCL sums."""
    if x.device in group._device_types or x.device.type != "cpu":
        dist.all_reduce(x, group=group)
    else:
        on_device = x.to(group._device_types[0])
        dist.all_reduce(on_device, group=group)
        x.copy_(on_device)


def end_groups() -> None:
    """Destroy the groups of the layout before, if there is one: each gloo group polls in threads of its own."""
    while _started:
        group = _started.pop()
        if group in dist.distributed_c10d._world.pg_map:  # else the group has ended with its world
            dist.destroy_process_group(group)
    parallel_state.destroy_global_memory_buffer()


def warm_up(groups: dict[str, dist.ProcessGroup], device: torch.device) -> None:
    """Make every communicator in one order on all ranks: the world's, those of `groups`, a pipeline's pairs.

    NCCL makes a communicator at its first use, which waits for all members -> in the middle of a step, ranks that use
    groups in different orders would wait for each other for ever. A collective of the world; needed under NCCL only.
    """
    x = torch.zeros(1, device=device)
    dist.all_reduce(x)
    for group in dict.fromkeys(groups.values()):  # each once
        if group is not dist.group.WORLD and group.size() > 1:
            dist.all_reduce(x, group=group)
    pipeline = groups["pipeline"]
    if (size := pipeline.size()) > 1:
        for first in range(size):  # stages send to the next rank, and interleaved ones from the last rank to the first
            if pipeline.rank() == first:
                dist.send(x, group=pipeline, group_dst=(first + 1) % size)
            elif pipeline.rank() == (first + 1) % size:
                dist.recv(x, group=pipeline, group_src=first)
