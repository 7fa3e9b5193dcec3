"""What a run was made with: the state of the code, the machines, the layout and what each pipeline stage holds."""

import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from parallel.layout import Layout
from parallel.partition import StageCost

STAGE_COLUMNS = [
    "stage", "first unit", "last unit", "units", "million parameters", "TFLOP per micro-batch", "memory GiB"
]  # fmt: skip
CODE = Path(__file__).resolve().parent
GIT_TIMEOUT_S = 20  # a repository on a slow network drive must not hold up the run


def git_state(folder: Path = CODE) -> dict[str, Any]:
    """`commit` and `dirty` (changes that are not committed) of the code; both None where it is in no repository."""
    commit, changes = (_git(folder, *words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain")))
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=GIT_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def hardware(device: torch.device, hosts: Sequence[str]) -> dict[str, Any]:
    """The machines; `hosts`: that of every rank. What is of one machine is of the first rank's."""
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
    """How the world is divided."""
    parallel = layout.config
    return {
        "world": layout.world_size,
        "data": layout.data_parallel_size,
        "pipeline": parallel.pipeline,
        "tensor": parallel.tensor,
        "sequence": parallel.sequence,
        "zero_stage": parallel.zero_stage,
        "micro_batch": parallel.micro_batch,
    }


def stage_rows(stages: Sequence[StageCost]) -> list[list[Any]]:
    """A row of STAGE_COLUMNS for each pipeline stage; memory is predicted, for a rank with all of its stages."""
    rows: list[list[Any]] = []
    for number, stage in enumerate(stages):
        size = [stage.parameters / 1e6, stage.flops / 1e12, stage.memory_bytes / 2**30]
        rows.append([number, stage.units[0], stage.units[-1], len(stage.units), *size])
    return rows
