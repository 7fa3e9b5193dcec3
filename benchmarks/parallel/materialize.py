"""Measure a rank's peak memory while a 1.5 B model is made in ZeRO-3 shards."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.parallel.formulas import FLOAT
from benchmarks.parallel.toy import MB, process_bytes, reset_peak, run_ranks
from model.describe import read_model
from model.layers import parameter_parts
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.distributed import launch
from parallel.engine import build
from parallel.layout import Layout
from parallel.plan.blueprint import Blueprint

MODEL, RANKS = "pali_1_5b", 4


class Enough(Exception):
    """Raised once all shards are made."""


def built(folder: Path, model: str) -> None:
    """Write this rank's peak memory while its shards are made, before ZeRO adds its buffers for training."""
    materialize, began = build.materialize, time.perf_counter()
    config, _ = read_model([f"model={model}", "phases=full_224"])
    layout = Layout.start(ParallelConfig(zero_stage=3, timeout_s=1800), launch())
    before = process_bytes("VmRSS")
    reset_peak()

    def watched(blueprint: Blueprint, *arguments: Any, **options: Any) -> None:
        materialize(blueprint, *arguments, **options)
        torch.save(
            {"peak": process_bytes("VmHWM") - before, "after": process_bytes("VmRSS") - before,
             "seconds": time.perf_counter() - began, "plan": largest_unit(blueprint)},
            folder / f"{layout.rank}.pt",
        )  # fmt: skip
        raise Enough

    build.materialize = watched
    with suppress(Enough):
        build.build_engine(config, OptimizerConfig(), layout, precision="bf16")


def largest_unit(blueprint: Blueprint) -> dict[str, int]:
    """Return the model's elements, and the bytes of its largest unit while it is filled.

    A unit being filled holds all of its parameters in 16 bits, and its largest tensor in fp32.
    """
    units = [[part.shape.numel() for _, part in parameter_parts(unit)] for _, unit in blueprint.plan.units()]
    return {"elements": sum(map(sum, units)), "unit": max(2 * sum(parts) + FLOAT * max(parts) for parts in units)}


def materialize(console: Console) -> None:
    """Print each rank's peak memory beside the expected one."""
    found = run_ranks(RANKS, built, MODEL)
    elements, unit = found[0]["plan"]["elements"], found[0]["plan"]["unit"]
    shard = 2 * elements / RANKS
    table = Table(
        title=f"{MODEL} ({elements / 1e9:.2f} B parameters, {2 * elements / MB:,.0f} MB in bf16) made in ZeRO-3 "
        f"shards over {RANKS} ranks, {found[0]['seconds']:.0f} s: memory of a rank beyond its imports"
    )
    for column in ("", "expected", *(f"rank {rank}" for rank in range(RANKS))):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for what, expected, key in (
        ("peak: shard + largest unit", shard + unit, "peak"),
        ("afterwards: shard", shard, "after"),
    ):
        table.add_row(what, f"{expected / MB:,.0f} MB", *(f"{each[key] / MB:,.0f} MB" for each in found))
    console.print(table)
