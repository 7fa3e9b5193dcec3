"""Find this process's rank and device, and start the process group of all ranks, under any launcher."""

import fcntl
import os
import resource
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from threading import Timer
from typing import TextIO, TypeVar

import torch
import torch.distributed as dist

from common.errors import ConfigurationError, PeersMissing
from common.launcher import Process, this_process
from parallel.rendezvous import set_rendezvous

Item = TypeVar("Item")
CLAIMS = Path("/dev/shm")  # files that mark GPUs as taken
_claims: list[TextIO] = []
NOTICE_S = 30.0  # ranks of one job rarely start further apart


@dataclass(frozen=True)
class Launch(Process):
    """Hold this process's rank among its peers, and its device."""

    @property
    def device(self) -> torch.device:
        """The CPU, the GPU of the local rank, or a GPU of those that the launcher shows to this rank.

        srun and mpirun may show each rank the GPUs near its cores only (`--gpu-bind=closest`); ranks that see the same
        ones then take one each. Raises ConfigurationError where there are more ranks than GPUs.
        """
        if not torch.cuda.is_available():
            return torch.device("cpu")
        count = torch.cuda.device_count()
        if count == 1:
            return torch.device("cuda", 0)
        if self.local_world_size > count and self.launcher in ("srun", "mpirun"):
            found = claim_gpu(count)
        else:
            found = self.local_rank if self.local_rank < count else None
        if found is None:
            raise ConfigurationError(
                f"{self.local_rank + 1} or more processes on this machine share {count} GPUs; start one per GPU."
            )
        return torch.device("cuda", found)


@cache
def claim_gpu(count: int) -> int | None:
    """Return the first of `count` visible GPUs that no other process of this user has claimed; None if all are.

    A claim is a lock of a file in this machine's memory that is named after the GPU; it ends with the process.
    """
    for index in range(count):
        uuid = torch.cuda.get_device_properties(index).uuid
        claim = (CLAIMS / f"pali-{os.getuid()}-gpu-{uuid}.lock").open("w", encoding="utf-8")
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            claim.close()
            continue
        _claims.append(claim)  # open until the process ends
        return index
    return None


def launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read the launcher's variables and start nothing. Raises ConfigurationError where they contradict each other."""
    return Launch(**vars(this_process(environment)))


def set_gpu_variables(environment: MutableMapping[str, str], in_order: bool) -> None:
    """Set variables of CUDA, the allocator and NCCL that nobody has set, before CUDA starts.

    `in_order`: launch kernels in the order of their calls, so that Megatron's tensor-parallel layers overlap messages
    with matrix products (megatron-core 0.16.1, tensor_parallel/layers.py); ZeRO-3 needs queues beside each other.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(environment):
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # lengths vary -> memory would fragment
    if not {"TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"} & set(environment):
        environment["TORCH_FR_BUFFER_SIZE"] = "2000"  # collectives that NCCL's watchdog dumps after a time-out
    if in_order:
        environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def start(this: Launch, timeout_s: float, in_order: bool = False) -> None:
    """Start the process group of all ranks, unless it is started: NCCL on GPUs, gloo on CPUs.

    `in_order`: see `set_gpu_variables`.

    A collective of all ranks. A later collective fails when a rank is silent for `timeout_s` seconds. Raises
    PeersMissing where some ranks do not come within `timeout_s`.
    """
    if dist.is_initialized():
        return
    if this.device.type == "cuda":
        set_gpu_variables(os.environ, in_order)
        torch.cuda.set_device(this.device)
    backend = "cpu:gloo,cuda:nccl" if this.device.type == "cuda" else "gloo"
    if this.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # gloo keeps a socket per peer and group
    torch.set_num_threads(num_threads(this, os.environ, len(os.sched_getaffinity(0)), os.cpu_count() or 1))
    set_rendezvous(this, os.environ)
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    by_hand = this.launcher == "torchrun" and "TORCHELASTIC_RUN_ID" not in os.environ  # RANK may be stale
    notice = Timer(NOTICE_S, _warn_of_waiting, (this, where))
    if this.rank == 0 or by_hand:
        notice.start()
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise PeersMissing(
            f"Rank {this.rank} of {this.world_size} waited {timeout_s:g} s at {where} and not all others came; look at "
            "their logs, or unset RANK and WORLD_SIZE to start one process."
        ) from error
    finally:
        notice.cancel()


def _warn_of_waiting(this: Launch, where: str) -> None:
    print(
        f"Rank {this.rank} of {this.world_size} still waits for the others at {where}; if none were started, unset "
        "RANK and WORLD_SIZE.",
        file=sys.stderr,
        flush=True,
    )


def gather_objects(items: list[Item], group: dist.ProcessGroup | None = None) -> list[Item]:
    """Return the items of all ranks of a group (the world), in order of rank, on each of them; a collective of it.

    Items are pickled. Without a process group, they are those of this process alone.
    """
    size = 1 if not dist.is_initialized() else group.size() if group is not None else dist.get_world_size()
    if size == 1:
        return items
    everywhere: list[list[Item]] = [[] for _ in range(size)]
    dist.all_gather_object(everywhere, items, group)
    return [item for own in everywhere for item in own]


def stop() -> None:
    """Destroy the process group of all ranks, if it is started."""
    if dist.is_initialized():
        dist.destroy_process_group()


def num_threads(this: Process, environment: Mapping[str, str], allowed: int, cores: int) -> int:
    """Return the CPU threads of one rank of several: as the environment sets them, else its share of the machine.

    `allowed` of the machine's `cores` are this process's. Fewer than all mean that the launcher has bound it.
    """
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        if environment.get(name, "").isdigit():
            return max(1, int(environment[name]))
    return allowed if allowed < cores else max(1, cores // this.local_world_size)
