"""Measure saving, loading and resharding of checkpoints beside `torch.save` and `torch.load`."""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.parallel.formulas import FLOAT
from benchmarks.parallel.toy import MB, build_toy, layout_name, run_ranks, step
from parallel.checkpoint.checkpointer import Checkpointer


def save(folder: Path, settings: dict[str, Any], checkpoints: Path) -> None:
    """Save three times; write the shortest seconds until training goes on and until all is on disk."""
    engine = build_toy(settings)
    step(engine)
    checkpointer, blocked, taken = Checkpointer(checkpoints), [], []
    for number in range(3):
        engine.layout.barrier()
        began = time.perf_counter()
        checkpointer.save(engine, number + 1, {})
        blocked.append(time.perf_counter() - began)
        checkpointer.wait()
        taken.append(time.perf_counter() - began)
    torch.save({"blocked": min(blocked), "seconds": min(taken)}, folder / f"{engine.layout.rank}.pt")


def load(folder: Path, settings: dict[str, Any], checkpoints: Path) -> None:
    """Load the newest checkpoint three times under this layout; write the shortest seconds."""
    engine, taken = build_toy(settings), []
    for _ in range(3):
        engine.layout.barrier()
        began = time.perf_counter()
        assert Checkpointer(checkpoints).load_latest(engine)
        taken.append(time.perf_counter() - began)
    torch.save({"seconds": min(taken)}, folder / f"{engine.layout.rank}.pt")


def plain(folder: Path, _: dict[str, Any], size: int) -> None:
    """Time `torch.save` (until fsync returns) and `torch.load` of `size` bytes in one process."""
    tensor, file, taken = torch.zeros(size // FLOAT), folder / "plain", []
    for _ in range(3):
        began = time.perf_counter()
        with file.open("wb") as opened:
            torch.save(tensor, opened)
            opened.flush()
            os.fsync(opened.fileno())
        saved = time.perf_counter()
        torch.load(file)
        taken.append((saved - began, time.perf_counter() - saved))
    best = [min(each) for each in zip(*taken, strict=True)]
    torch.save({"save": best[0], "load": best[1]}, folder / "0.pt")


def checkpoints(console: Console) -> None:
    """Print seconds and MB/s of each way to save and load."""
    table = Table(title="checkpoints: whole, with SHA-256 made and checked, on disk (fsync); best of 3")
    for column in ("what", "layout", "size", "seconds", "MB/s"):
        table.add_column(column, justify="left" if column in ("what", "layout") else "right", no_wrap=True)
    layout = {"tensor": 2, "pipeline": 2, "zero_stage": 1}
    with tempfile.TemporaryDirectory() as kept:
        place = Path(kept) / "checkpoints"
        saved = run_ranks(4, save, layout, place)
        size = sum(f.stat().st_size for f in (place / "step_00000003").iterdir())
        rows = [
            ("save: training waits", "4 ranks", layout, max(each["blocked"] for each in saved)),
            ("save: on disk", "4 ranks", layout, max(each["seconds"] for each in saved)),
            ("load", "4 ranks", layout, run_ranks(4, load, layout, place)[0]["seconds"]),
        ]
        for ranks, other in ((2, {"zero_stage": 3}), (4, {"tensor": 4}), (1, {})):
            seconds = run_ranks(ranks, load, other, place)[0]["seconds"]
            rows.append(("reshard", f"{ranks} rank" + "s" * (ranks > 1), other, seconds))
        alone = run_ranks(1, plain, {}, size)[0]
        rows += [(f"torch.{verb}", "1 process", {}, alone[verb]) for verb in ("save", "load")]
    for what, ranks, settings, seconds in rows:
        where = f"{ranks}: {layout_name(settings)}" if settings else ranks
        table.add_row(what, where, f"{size / MB:.0f} MB", f"{seconds:.2f} s", f"{size / MB / seconds:.0f}")
    console.print(table)
