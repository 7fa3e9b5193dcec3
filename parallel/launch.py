"""Who am I: rank, world and device, from torchrun's variables, or one process alone."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Launch:
    """This process among its peers; `local_rank` counts within the machine."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def launch() -> Launch:
    """Read the launcher's variables; nothing is started."""
    return Launch(
        int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    )


def start(this: Launch, timeout_s: float) -> None:
    """Meet the other ranks (NCCL on GPUs, gloo on CPUs); a collective that hears nothing for `timeout_s` seconds
    fails."""
    if dist.is_initialized():
        return
    if this.device.type == "cuda":
        torch.cuda.set_device(this.device)
    backend = "cpu:gloo,cuda:nccl" if this.device.type == "cuda" else "gloo"
    if this.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


def stop() -> None:
    """Leave the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
