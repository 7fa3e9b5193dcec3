"""Shard parameters for ZeRO-3 with DeepSpeed 0.19.8; every private name that this takes is here and in gathers.py.

1. LOCAL_RANK: DeepSpeed takes the GPU of that number, and raises without it. A launcher may show a rank one GPU, or
   those of its socket -> the variable, and Open MPI's that must equal it, are this rank's device while DeepSpeed reads
   them.
2. ZeRO++ hpZ: we make the groups of nearby ranks, because DeepSpeed takes neighbors in the world, which may be
   tensor-parallel, and makes them anew for every unit that is sharded.
3. Shards: rank r of d has elements [r c, (r + 1) c) of a flattened parameter, c = ceil(n / d). DeepSpeed has no public
   map of them (`Bucket` has one).

tests/distributed/test_options_workarounds.py fails when one of these is no longer so.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.comm.coalesced_collectives import all_to_all_quant_reduce
from deepspeed.utils import groups
from torch import Tensor, nn

from common.library_patches import set_secondary_group, skip_shared_memory_op
from parallel.engine.buckets import Bucket
from parallel.engine.reducer import Send
from parallel.layout import Layout
from parallel.plan.blueprint import Blueprint, ShardUnit
from parallel.shards import is_sharded

# DeepSpeed 0.19.8's defaults of all that `zero.Init` and gathers read, written out because defaults have changed
# between versions.
DEFAULTS = {
    "memory_efficient_linear": True,  # F.linear keeps the parameter for the backward pass, not its gathered memory
    "allgather_sequential": False,
    "use_all_reduce_for_fetch_params": False,
    "zero_quantized_nontrainable_weights": False,
    "override_module_apply": True,
    "enable_sanity_checks": False,
}

for name in ("DeepSpeed", "deepspeed"):  # DeepSpeed logs its settings on every rank
    logging.getLogger(name).setLevel(logging.ERROR)


def start_sharding(blueprint: Blueprint) -> ShardUnit:
    """Start DeepSpeed's communication; return the function that shards the large parameters of a filled unit.

    Those stay whole that have at most `param_persistence_threshold` elements, and frozen ones unless `shard_frozen`. A
    collective of the data-parallel group.
    """
    layout, settings = blueprint.layout, _deepspeed_config(blueprint)
    config = layout.config
    skip_shared_memory_op()
    with device_as_local_rank(layout.device):
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
    nearby = _start_nearby_group(layout)

    def shard(unit: nn.Module) -> None:
        parameters = [p for p in unit.parameters() if is_sharded(p.numel(), p.requires_grad, config)]
        if not parameters:
            return
        with device_as_local_rank(layout.device):
            deepspeed.zero.Init(
                module=nn.ParameterList(parameters),
                data_parallel_group=layout.data_group,
                zero_param_parallel_group=nearby,
                config_dict_or_path=settings,
                dtype=blueprint.dtype,
            )

    return shard


def quantized_sums(layout: Layout) -> Send:
    """Return ZeRO++'s reduction of gradients as int4, which divides the sum by the ranks; see `Reducer.send`.

    DeepSpeed quantizes between nodes only, and sums in full precision on one node.
    """
    group = groups._get_local_all_to_all_group()

    def send(bucket: Bucket, buffer: Tensor) -> tuple[dist.Work | None, Tensor]:
        shard = buffer.new_zeros(bucket.shard_size)
        if bucket.rows == 1:
            return dist.reduce_scatter_tensor(shard, buffer, group=layout.data_group, async_op=True), shard
        wholes = [bucket.whole(buffer, i).view(p.ds_shape) for i, p in enumerate(_as_any(bucket.parameters))]
        for mean, count, start in zip(
            all_to_all_quant_reduce(wholes, group), bucket.counts, bucket.starts, strict=True
        ):
            shard[start : start + min(count, mean.numel())] = mean.flatten()[:count] * bucket.ranks
        return None, shard

    return send


def _as_any(parameters: list[nn.Parameter]) -> list[Any]:
    return list(parameters)


@contextmanager
def device_as_local_rank(device: torch.device) -> Iterator[None]:
    """Set the variables from which DeepSpeed takes the number of this rank's GPU (1)."""
    names = {"LOCAL_RANK", *(name for name in ("OMPI_COMM_WORLD_LOCAL_RANK",) if name in os.environ)}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(device.index or 0)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start_nearby_group(layout: Layout) -> dist.ProcessGroup | None:
    """Start the group of data-parallel ranks that share a second copy of parameters (2).

    Return None where `hpz_partition_size` is 1. A collective of the group.
    """
    size, ranks = layout.config.hpz_partition_size, dist.get_process_group_ranks(layout.data_group)
    if size == 1:
        return None
    first = layout.data_parallel_rank // size * size
    timeout = timedelta(seconds=layout.config.timeout_s)  # the default would be DeepSpeed's or torch's own
    group = dist.new_group(ranks[first : first + size], timeout, use_local_synchronization=True)
    set_secondary_group(group)
    return group


def _deepspeed_config(blueprint: Blueprint) -> dict[str, Any]:
    config, on_gpu = blueprint.layout.config, blueprint.layout.device.type == "cuda"
    where = config.offload_parameters
    # Files are mapped by ours: to DeepSpeed, "nvme" is the CPU. Pinned memory cannot be mapped into files.
    offload = {"offload_param": {"device": "cpu", "pin_memory": on_gpu and where == "cpu"}} if where != "none" else {}
    return {
        "train_micro_batch_size_per_gpu": 1,  # required by DeepSpeed, but rows are counted by the caller
        "bf16": {"enabled": blueprint.dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": 3,
            **DEFAULTS,
            **offload,
            "zero_hpz_partition_size": config.hpz_partition_size,
            "zero_quantized_weights": config.quantized_weights,
            "zero_quantized_gradients": config.quantized_gradients,
        },
    }
