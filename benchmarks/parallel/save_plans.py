"""Measure how long the plan of a save holds the main rank's interpreter, in a thread or in a process of its own."""

import pickle
import threading
import time
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from parallel.checkpoint import global_plan

RANKS, PIECES = 1024, 69  # of a rank
OPERATORS = 200  # between two looks at the clock


def plan(rank: int) -> SavePlan:
    """Return the plan of a rank: a row of each tensor."""
    items = [
        WriteItem(
            MetadataIndex(f"weights/encoder_block_{number}.weight", (rank, 0)),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                ChunkStorageMetadata(torch.Size((rank, 0)), torch.Size((1, 64))),
                TensorProperties(torch.float32),
                torch.Size((RANKS, 64)),
            ),
        )
        for number in range(PIECES)
    ]
    return SavePlan(items, planner_data={item.index.fqn: (item.index.fqn,) for item in items})


def places(rank: int, own: SavePlan) -> list[WriteResult]:
    """Return where the pieces of a rank lie in its file."""
    return [
        WriteResult(item.index, 256, _StorageInfo(f"__{rank}_0.distcp", 300 * number, 300))
        for number, item in enumerate(own.items)
    ]


def save_plans(console: Console) -> None:
    """Print seconds of CPU that planning takes in this process, and the longest pause of operators beside it."""
    own = [plan(rank) for rank in range(RANKS)]
    plans, results = ([pickle.dumps(each) for each in many] for many in (own, map(places, range(RANKS), own)))
    table = Table(title=f"the plan of a save: {RANKS} ranks with {PIECES} pieces each, and eager operators beside it")
    for column in ("where", "seconds", "of CPU in this process", f"longest {OPERATORS} operators"):
        table.add_column(column, justify="left" if column == "where" else "right")
    for where, limit in (("in a thread", 2**60), ("in a process", 0)):
        with patch.object(global_plan, "AWAY_BYTES", limit):
            seconds, cpu, longest = _beside_operators(plans, results)
        table.add_row(where, f"{seconds:.1f} s", f"{cpu:.2f} s", f"{1e3 * longest:.0f} ms")
    console.print(table)


def _beside_operators(plans: list[bytes], results: list[bytes]) -> tuple[float, float, float]:
    """Plan in a thread while this one computes; return its seconds, its seconds of CPU, and the longest pause."""
    times: list[float] = []

    def work() -> None:
        began, cpu = time.perf_counter(), time.thread_time()
        _, metadata = global_plan.join_plans(plans)
        global_plan.describe(metadata, results, b"", "")
        times.extend((time.perf_counter() - began, time.thread_time() - cpu))

    thread, x, longest = threading.Thread(target=work), torch.zeros(64, 64), 0.0
    thread.start()
    while thread.is_alive():
        began = time.perf_counter()
        for _ in range(OPERATORS):
            x.add(1.0)
        longest = max(longest, time.perf_counter() - began)
    thread.join()
    return times[0], times[1], longest
