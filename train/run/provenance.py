"""Describe what a run is made with: the machines, the layout and the content of each pipeline stage."""

import os
import platform
from collections.abc import Sequence
from typing import Any

import psutil
import torch

from parallel.layout import Layout
from parallel.plan.cut import StageCost

STAGE_COLUMNS = [
    "stage", "first unit", "last unit", "units", "million parameters", "TFLOP per micro-batch", "memory GiB"
]  # fmt: skip


def hardware(device: torch.device, hosts: Sequence[str]) -> dict[str, Any]:
    """Describe the machines. `hosts` has one entry per rank; single-machine facts describe the main rank's host."""
    return {
        "hosts": list(dict.fromkeys(hosts)),
        "ranks_per_host": max(hosts.count(host) for host in set(hosts)),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "device_memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30
        if device.type == "cuda"
        else None,
        "cores": os.cpu_count(),
        "memory_gib": psutil.virtual_memory().total / 2**30,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def degrees(layout: Layout) -> dict[str, Any]:
    """Return the degrees of parallelism and the size of the world."""
    parallel = layout.config
    return {
        "world": layout.world_size,
        "data": layout.data_parallel_size,
        "pipeline": parallel.pipeline,
        "tensor": parallel.tensor,
        "sequence": parallel.sequence,
        "zero_stage": parallel.zero_stage,
        "micro_batch_size": parallel.micro_batch_size,
    }


def stage_rows(stages: Sequence[StageCost]) -> list[list[Any]]:
    """Return a row of STAGE_COLUMNS for each stage; memory is predicted, for a rank with all of its stages."""
    rows: list[list[Any]] = []
    for number, stage in enumerate(stages):
        size = [stage.parameters / 1e6, stage.flops / 1e12, stage.memory_bytes / 2**30]
        rows.append([number, stage.units[0], stage.units[-1], len(stage.units), *size])
    return rows
