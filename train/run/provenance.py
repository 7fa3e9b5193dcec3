"""What a run was made with: the state of the code, the machines, the layout and what each pipeline stage holds."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from common.git import commit_of, git
from parallel.layout import Layout
from parallel.plan.cut import StageCost

STAGE_COLUMNS = [
    "stage", "first unit", "last unit", "units", "million parameters", "TFLOP per micro-batch", "memory GiB"
]  # fmt: skip
CODE = Path(__file__).resolve().parent
GIT_TIMEOUT_S = 20  # a repository on a slow network drive must not hold up the run


def git_state(folder: Path = CODE) -> dict[str, Any]:
    """`commit` and `dirty` (changes that are not committed) of the code; both None where it is in no repository.

    A snapshot (slurm/code_snapshot.py) has them in a file: the checkout around it is another one by now.
    """
    kept = folder.parent.parent / "commit.txt"
    if folder.parent.name == "code" and kept.is_file():
        first, *changed = kept.read_text(encoding="utf-8").splitlines()
        is_commit = len(first.split()) == 1
        return {"commit": first if is_commit else None, "dirty": bool(changed) if is_commit else None}
    commit, changes = commit_of(folder), git(folder, "status", "--porcelain")
    if commit is None and git(folder, "rev-parse", "HEAD"):
        changes = None  # they are of a checkout around the folder
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


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
        "micro_batch_size": parallel.micro_batch_size,
    }


def stage_rows(stages: Sequence[StageCost]) -> list[list[Any]]:
    """A row of STAGE_COLUMNS for each pipeline stage; memory is predicted, for a rank with all of its stages."""
    rows: list[list[Any]] = []
    for number, stage in enumerate(stages):
        size = [stage.parameters / 1e6, stage.flops / 1e12, stage.memory_bytes / 2**30]
        rows.append([number, stage.units[0], stage.units[-1], len(stage.units), *size])
    return rows
