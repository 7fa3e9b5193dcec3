"""Own degrees and process groups in one object: world = data x pipeline x tensor, with tensor ranks adjacent."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import ConfigurationError
from model.config import PaLIConfig
from model.tensor_parallel import PlannedGroup, TensorParallel
from parallel.config import ParallelConfig
from parallel.distributed import Launch, gather_objects, start
from parallel.process_groups import (
    ReadingGroups,
    start_background_group,
    start_groups,
    start_reading_groups,
    warm_up,
)

T = TypeVar("T")


def check(parallel: ParallelConfig, model: PaLIConfig, world_size: int) -> None:
    """Raise ConfigurationError, before anything starts, for degrees that do not divide the world or the model."""
    vit, mt5, tensor, pipeline = model.vit, model.mt5, parallel.tensor, parallel.pipeline
    if world_size % parallel.replica_size:
        raise ConfigurationError(
            f"{world_size} process{'es' * (world_size > 1)} cannot be divided into parallel.tensor={tensor} x "
            f"parallel.pipeline={pipeline}; "
            f"start a multiple of {parallel.replica_size} processes."
        )
    data = parallel.data_parallel_size(world_size)
    if data % parallel.hpz_partition_size:
        raise ConfigurationError(
            f"parallel.hpz_partition_size={parallel.hpz_partition_size} does not divide the data-parallel size {data}; "
            "choose a divisor."
        )
    vit_sizes = {"vit.num_heads": vit.num_heads, "vit.mlp_dim": vit.mlp_dim}
    divided = {
        **({} if parallel.replicate_frozen_vit else vit_sizes),
        "mt5.num_heads": mt5.num_heads,
        "mt5.d_ff": mt5.d_ff,
        "mt5.vocab_size": mt5.vocab_size,
    }
    divided = {name: n for name, n in divided.items() if model.tower in (None, name.partition(".")[0])}
    for name, value in divided.items():
        if value % tensor:
            raise ConfigurationError(
                f"{name}={value} is not a multiple of parallel.tensor={tensor}; choose a tensor size that divides it."
            )
    if parallel.sequence and tensor == 1:
        raise ConfigurationError(
            "parallel.sequence=true splits sequences over tensor-parallel ranks; set parallel.tensor to 2 or more."
        )
    if parallel.replicate_frozen_vit and (tensor == 1 or model.tower is not None):
        found = "there is one" if tensor == 1 else f"the {model.tower} is trained alone"
        raise ConfigurationError(
            "parallel.replicate_frozen_vit=true divides images of a frozen ViT over tensor-parallel ranks, but "
            f"{found}; set it to false."
        )


def planned_tensor_parallel(parallel: ParallelConfig, rank: int) -> TensorParallel:
    """Return the tensor-parallel group of a rank of the world before it starts."""
    group = PlannedGroup(parallel.tensor, rank % parallel.tensor)
    return TensorParallel(group, parallel.sequence, parallel.replicate_frozen_vit)


def check_device(parallel: ParallelConfig, device: torch.device) -> None:
    """Raise ConfigurationError for options that this device cannot run; `check` may run on a node without GPUs."""
    if (parallel.quantized_weights or parallel.quantized_gradients) and device.type != "cuda":
        raise ConfigurationError(
            "parallel.quantized_weights and quantized_gradients need DeepSpeed's CUDA kernels; set both to false here."
        )


def start_world(parallel: ParallelConfig, this: Launch) -> None:
    """Start the process group of all ranks, unless it is started already.

    Raises ConfigurationError as `check_device` does, before anything starts.
    """
    check_device(parallel, this.device)
    start(this, parallel.timeout_s, in_order=parallel.tensor > 1 and parallel.zero_stage < 3)


@dataclass(eq=False)
class Layout:
    """Own the degrees of parallelism, this rank's number in each, and the process groups that follow from them.

    `Layout.start` makes one; the constructor starts nothing. `model_group` is one replica: tensor x pipeline ranks.
    `stage_group` is every rank that holds the same pipeline stage: tensor x data ranks.
    """

    config: ParallelConfig
    device: torch.device
    rank: int
    world_size: int
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    model_group: dist.ProcessGroup
    stage_group: dist.ProcessGroup

    @classmethod
    def start(cls, parallel: ParallelConfig, this: Launch) -> "Layout":
        """Start the world and every process group of the layout; a collective of all ranks.

        A layout that was started before ends. Raises ConfigurationError, before any group starts, for options that the
        devices here cannot run.
        """
        start_world(parallel, this)
        groups = start_groups(parallel, this.rank, this.world_size)
        if this.device.type == "cuda" and this.world_size > 1:
            warm_up(groups, this.device)
        return cls(
            parallel, this.device, this.rank, this.world_size, **{f"{kind}_group": groups[kind] for kind in groups}
        )

    def with_config(self, parallel: ParallelConfig) -> "Layout":
        """Return a layout of the same groups with the settings of a phase, whose degrees are the same."""
        other = copy(self)
        other.config = parallel
        return other

    @cached_property
    def background_group(self) -> dist.ProcessGroup:
        """Return a second world group, on gloo, for the checkpoint thread.

        Its collectives interleave with training's, and on the same group they would deadlock. The first access starts
        the group, and is a collective.
        """
        return start_background_group(self.config.timeout_s)

    @property
    def reading_groups(self) -> ReadingGroups:
        """Return the groups in which ranks exchange the rows that they read."""
        return ReadingGroups(self.model_group, self.data_group if self.is_replica_leader else None)

    @cached_property
    def background_reading_groups(self) -> ReadingGroups:
        """Return second groups of the same ranks, on gloo, for the thread that reads ahead.

        The first access starts them, and is a collective of the world.
        """
        return start_reading_groups(self.config, self.rank, self.world_size, self.reading_groups)

    @property
    def data_parallel_rank(self) -> int:
        """Return this rank's number among the ranks that read different rows."""
        return self.data_group.rank()

    @property
    def data_parallel_size(self) -> int:
        """Return the number of replicas; each reads its own rows."""
        return self.data_group.size()

    @property
    def tensor_parallel_rank(self) -> int:
        """Return this rank's number among those that hold blocks of the same tensors."""
        return self.tensor_group.rank()

    @property
    def is_replica_leader(self) -> bool:
        """Return whether this is rank 0 of its replica (`model_group`), which reads data and sends it to the others."""
        return self.model_group.rank() == 0

    @property
    def tensor_parallel(self) -> TensorParallel:
        """Return the tensor-parallel group in the form that layers are built with."""
        return TensorParallel(self.tensor_group, self.config.sequence, self.config.replicate_frozen_vit)

    def all_reduce_data(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce `x` in place over the ranks that read different rows, and return it; a collective of those ranks."""
        if self.data_parallel_size > 1:
            dist.all_reduce(x, op, group=self.data_group)
        return x

    def broadcast_from_main(self, ask: Callable[[], T]) -> T:
        """Call `ask` on the main rank and return its result on every rank; a collective.

        An example is a look at a shared disk, which other hosts may see later. An exception of `ask` is raised on every
        rank, so that none waits for a main rank that has left.
        """
        if self.world_size == 1:
            return ask()
        message: list[Any] = [None, None]  # (result, exception)
        if self.rank == 0:
            try:
                message[0] = ask()
            except Exception as raised:
                message[1] = raised
        dist.broadcast_object_list(message, device=torch.device("cpu"))
        result, error = message
        if error is not None:
            if self.rank:
                error.alone = False  # the main rank prints the message
            raise error
        return cast(T, result)

    def gather_objects(self, items: list[T]) -> list[T]:
        """Return the items of all ranks, in order of rank, on every rank; a collective."""
        return gather_objects(items)

    def any_rank(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank of the world; a collective."""
        x = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return bool(x.item())

    def barrier(self) -> None:
        """Wait until every rank is here."""
        dist.barrier()
