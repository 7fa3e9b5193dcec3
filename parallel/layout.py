"""The one object that owns degrees and process groups: world = data x pipeline x tensor, tensor ranks next to each
other."""

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from common.errors import ConfigurationError
from model.config import MT5Config, ViTConfig
from model.layers import TensorParallel
from parallel.config import ParallelConfig
from parallel.distributed import Launch, gather_objects, start

T = TypeVar("T")


def check(parallel: ParallelConfig, vit: ViTConfig, mt5: MT5Config, world_size: int) -> None:
    """Raise ConfigurationError, before anything starts, for a layout that the world or the model cannot be divided
    into."""
    tensor, pipeline = parallel.tensor, parallel.pipeline
    if world_size % (tensor * pipeline):
        raise ConfigurationError(
            f"{world_size} process{'es' * (world_size > 1)} cannot be divided into parallel.tensor={tensor} x "
            f"parallel.pipeline={pipeline}; "
            f"start a multiple of {tensor * pipeline} processes."
        )
    data = world_size // (tensor * pipeline)
    if data % parallel.hpz_partition_size:
        raise ConfigurationError(
            f"parallel.hpz_partition_size={parallel.hpz_partition_size} does not divide the data-parallel size {data}; "
            "choose a divisor."
        )
    divided = {
        "vit.num_heads": vit.num_heads,
        "vit.mlp_dim": vit.mlp_dim,
        "mt5.num_heads": mt5.num_heads,
        "mt5.d_ff": mt5.d_ff,
        "mt5.vocab_size": mt5.vocab_size,
    }
    for name, value in divided.items():
        if value % tensor:
            raise ConfigurationError(
                f"{name}={value} is not a multiple of parallel.tensor={tensor}; choose a tensor size that divides it."
            )
    if parallel.sequence and tensor == 1:
        raise ConfigurationError(
            "parallel.sequence=true splits sequences over tensor-parallel ranks; set parallel.tensor to 2 or more."
        )


def check_device(parallel: ParallelConfig, device: torch.device) -> None:
    """Raise ConfigurationError for what this device cannot do; `check` may run on a login node without any GPU."""
    if (parallel.quantized_weights or parallel.quantized_gradients) and device.type != "cuda":
        raise ConfigurationError(
            "parallel.quantized_weights and quantized_gradients need DeepSpeed's CUDA kernels; set both to false here."
        )


def meet(parallel: ParallelConfig, this: Launch) -> None:
    """Start the one group of all ranks, unless it is; raises ConfigurationError as `check_device` does, before that."""
    check_device(parallel, this.device)
    start(this, parallel.timeout_s)


class Layout:
    """Degrees, this process's place in them, and the groups that follow. Starting it is a collective of all ranks.

    Raises ConfigurationError, before any group starts, for what the devices here cannot do.
    """

    def __init__(self, parallel: ParallelConfig, this: Launch) -> None:
        meet(parallel, this)
        _close_groups()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=parallel.timeout_s / 60,
        )
        self.config, self.device = parallel, this.device
        self.rank, self.world_size = this.rank, this.world_size
        self.tensor_group = parallel_state.get_tensor_model_parallel_group()
        self.pipeline_group = parallel_state.get_pipeline_model_parallel_group()
        self.data_group = parallel_state.get_data_parallel_group()
        self.model_group = parallel_state.get_model_parallel_group()
        self.stage_group = parallel_state.get_tensor_and_data_parallel_group()  # everyone who shares a pipeline stage

    @cached_property
    def background_group(self) -> dist.ProcessGroup:
        """All ranks once more, through their hosts: for a thread beside training, whose collectives come in another
        order. Asking for it the first time is a collective."""
        timeout = timedelta(seconds=self.config.timeout_s)
        return parallel_state.create_group(range(self.world_size), backend="gloo", timeout=timeout)

    @property
    def data_parallel_rank(self) -> int:
        return self.data_group.rank()

    @property
    def data_parallel_size(self) -> int:
        return self.data_group.size()

    @property
    def tensor_parallel_rank(self) -> int:
        return self.tensor_group.rank()

    @property
    def is_replica_leader(self) -> bool:
        """Whether this is the first rank of its replica (`model_group`): it reads, and tells the others."""
        return self.model_group.rank() == 0

    @property
    def tensor_parallel(self) -> TensorParallel:
        return TensorParallel(self.tensor_group, self.config.sequence)

    def all_reduce_data(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """In place, over the ranks that read different rows."""
        if self.data_parallel_size > 1:
            dist.all_reduce(x, op, group=self.data_group)
        return x

    def broadcast_from_main(self, ask: Callable[[], T]) -> T:
        """What `ask` gives on the first rank, on every rank: of a shared disk, say, which others may see later. A
        collective.

        Raises on every rank what `ask` raises: nobody waits for a first rank that has left.
        """
        if self.world_size == 1:
            return ask()
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told[0] = ask()
            except Exception as raised:
                told[1] = raised
        dist.broadcast_object_list(told, device=torch.device("cpu"))
        answer, error = told
        if error is not None:
            if self.rank:
                error.alone = False  # the first rank prints the sentence
            raise error
        return cast(T, answer)

    def gather_objects(self, items: list[T]) -> list[T]:
        """Return the items of all ranks, in order of rank, on every rank; a collective."""
        return gather_objects(items)

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank of the world; a collective."""
        x = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return bool(x.item())

    def barrier(self) -> None:
        dist.barrier()


def _close_groups() -> None:
    """End the layout before, if there is one: each of its gloo groups would poll on, in threads of its own."""
    if parallel_state.model_parallel_is_initialized():
        _, *groups = parallel_state._global_process_group_list  # the first stands for the world
        for group in groups:
            with suppress(ValueError):  # it has ended with the world that it belonged to
                dist.destroy_process_group(group)
        parallel_state.destroy_model_parallel()
