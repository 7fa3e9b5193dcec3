"""Measure step time, bytes sent and peak memory of layouts."""

import csv
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.parallel.formulas import Bytes, expected_bytes
from benchmarks.parallel.toy import (
    MB,
    MICRO_BATCHES,
    MT5,
    VIT,
    build_toy,
    layout_name,
    micro_batch,
    process_bytes,
    reset_peak,
    run_ranks,
    step,
)
from benchmarks.parallel.traffic import counted
from parallel.engine.base import Engine

LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [{}, {"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 3},
        {"zero_stage": 3, "gather": "step"}, {"tensor": 2}, {"tensor": 2, "sequence": True},
        {"pipeline": 2}, {"pipeline": 2, "schedule": "gpipe"}, {"pipeline": 2, "virtual_stages": 2}],
    4: [{"zero_stage": 1}, {"zero_stage": 3}, {"tensor": 2, "zero_stage": 1}, {"tensor": 4, "sequence": True},
        {"pipeline": 4}, {"pipeline": 2, "zero_stage": 1}, {"pipeline": 2, "zero_stage": 2},
        {"pipeline": 2, "zero_stage": 3}],
    8: [{"zero_stage": 3}, {"tensor": 2, "pipeline": 2, "zero_stage": 1},
        {"tensor": 2, "pipeline": 2, "zero_stage": 3, "sequence": True}, {"pipeline": 4, "zero_stage": 1},
        {"pipeline": 4, "zero_stage": 3}],
}  # fmt: skip
CSV_COLUMNS = ["ranks", "layout", "step_ms", "rank", "peak_memory_mb", "group", "kind", "sent_mb", "formula_mb"]
GROUPS = {"data": "data", "tensor": "tensor", "pipeline": "pipeline", "stage": "optimizer"}  # -> column of the table
SMALL = 1e4  # bytes; norms, flags and sums of the vocabulary-parallel loss stay below it, and no formula counts them


def measure(folder: Path, settings: dict[str, Any], repeats: int) -> None:
    """Write this rank's median step seconds, peak memory and bytes sent to `folder`."""
    before = process_bytes("VmRSS")
    reset_peak()
    engine = build_toy(settings)
    step(engine)
    seconds = [step(engine) for _ in range(repeats)]
    peak = process_bytes("VmHWM") - before
    found = {"seconds": statistics.median(seconds), "peak": peak, **traffic(engine)}
    torch.save(found, folder / f"{engine.layout.rank}.pt")


def traffic(engine: Engine) -> dict[str, Bytes]:
    """Count the bytes that this rank sends in a step, and compute them by the formula."""
    layout = engine.layout
    groups = {"tensor": layout.tensor_group, "pipeline": layout.pipeline_group, "data": layout.data_group}
    with counted({**groups, "stage": layout.stage_group}) as sent:
        step(engine)
    return {"sent": sent, "formula": expected_bytes(engine, VIT, MT5, micro_batch(0), MICRO_BATCHES)}


def layouts(console: Console, sizes: list[int], repeats: int, csv_file: str | None) -> None:
    """Print bytes by group of the rank that sends most; write every rank and kind to `csv_file`."""
    lines: list[Sequence[object]] = []
    for size in sizes:
        title = f"{size} processes on {os.cpu_count()} cores: one step of {MICRO_BATCHES} micro-batches, fp32"
        table = Table(title=title)
        table.add_column("layout", no_wrap=True)
        for column in ("step", "peak memory", *(c for name in GROUPS.values() for c in (name, "formula"))):
            table.add_column(column, justify="right", no_wrap=True)
        for settings in LAYOUTS[size]:
            found = run_ranks(size, measure, settings, repeats)
            lines += csv_lines(size, settings, found)
            table.add_row(*table_row(settings, found))
        console.print(table)
    if csv_file is not None:
        with Path(csv_file).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([CSV_COLUMNS, *lines])
        console.print(f"every rank and kind: {csv_file}")


def table_row(settings: dict[str, Any], found: list[dict[str, Any]]) -> list[str]:
    """Return the table's cells of one layout."""
    worst = max(found, key=lambda each: sum(each["sent"].values()))
    sent, formula = by_group(worst["sent"]), by_group(worst["formula"])
    return [
        layout_name(settings),
        f"{found[0]['seconds'] * 1e3:.0f} ms",
        f"{max(each['peak'] for each in found) / MB:.0f} MB",
        *(f"{x[group] / MB:.2f} MB" if x[group] else "-" for group in GROUPS for x in (sent, formula)),
    ]


def csv_lines(size: int, settings: dict[str, Any], found: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    """Return one line of CSV_COLUMNS for each rank, group and kind of collective."""
    lines: list[tuple[object, ...]] = []
    for rank, each in enumerate(found):
        start = size, layout_name(settings), f"{1e3 * each['seconds']:.0f}", rank, f"{each['peak'] / MB:.0f}"
        for group, kind, sent_bytes, expected in sent_and_expected(each):
            lines.append((*start, group, kind, f"{sent_bytes / MB:.3f}", f"{expected / MB:.3f}"))
    return lines


def sent_and_expected(found: dict[str, Any]) -> list[tuple[str, str, float, float]]:
    """List (group, kind, bytes sent, bytes by the formula) of one rank, without flags and norms (see SMALL)."""
    sent, formula = found["sent"], found["formula"]
    kept = sorted(key for key in sent | formula if key in formula or sent[key] > SMALL)
    return [(*key, sent[key], formula[key]) for key in kept]


def by_group(sent: Bytes) -> Counter[str]:
    """Sum bytes over the kinds of collectives."""
    total = Counter[str]()
    for (group, _), value in sent.items():
        total[group] += value
    return total


def gathers(console: Console, repeats: int) -> None:
    """Compare ZeRO-3 inside pipeline stages, gathered per micro-batch or kept over the step, with ZeRO-1."""
    table = Table(title=f"2 stages x 2 data-parallel ranks, one step of {MICRO_BATCHES} micro-batches, fp32")
    for column in ("layout", "step", "peak memory", "data"):
        table.add_column(column, justify="left" if column == "layout" else "right", no_wrap=True)
    for settings in ({"zero_stage": 1}, {"zero_stage": 3}, {"zero_stage": 3, "gather": "step"}):
        found = run_ranks(4, measure, {"pipeline": 2, **settings}, repeats)
        table.add_row(
            layout_name({"pipeline": 2, **settings}),
            f"{found[0]['seconds'] * 1e3:.0f} ms",
            f"{max(each['peak'] for each in found) / MB:.0f} MB",
            f"{max(by_group(each['sent'])['data'] for each in found) / MB:.2f} MB",
        )
    console.print(table)
