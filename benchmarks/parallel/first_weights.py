"""Measure a rank's private memory while a 1.5 B model is read from files into the shards of four ranks."""

import tempfile
import threading
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.generate import export_random
from benchmarks.parallel.materialize import MODEL, RANKS
from benchmarks.parallel.toy import MB, process_bytes, run_ranks
from model.describe import read_model
from model.layers import parameter_parts
from parallel.checkpoint.initial_weights import load_first_weights
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.distributed import launch
from parallel.engine.build import build_engine
from parallel.layout import Layout
from train.config import WeightsConfig
from train.weights.tower_weights import open_towers, sources

LAYOUTS = {"ZeRO-3": {"zero_stage": 3}, "tensor 2 x pipeline 2": {"tensor": 2, "pipeline": 2}}
INTERVAL_S = 0.002  # between two looks at the memory of a rank


def read(folder: Path, export: Path, model: str, degrees: dict[str, int]) -> None:
    """Build an engine, read all of its tensors from files, and write this rank's memory."""
    config, _ = read_model([f"model={model}", "phases=full_224"])
    layout = Layout.start(ParallelConfig(timeout_s=1800, **degrees), launch())
    given = sources(open_towers(WeightsConfig(vit=str(export), mt5=str(export))))
    names = {name for each in given for name in each.shapes}
    engine = build_engine(config, OptimizerConfig(), layout, precision="bf16", given=names)
    peak, done, before, began = [0], threading.Event(), process_bytes("RssAnon"), time.perf_counter()

    def watch() -> None:
        while not done.wait(INTERVAL_S):
            peak[0] = max(peak[0], process_bytes("RssAnon"))

    watching = threading.Thread(target=watch)
    watching.start()
    load_first_weights(engine, given)
    done.set()
    watching.join()
    largest = max(part.shape.numel() for _, part in parameter_parts(engine.blueprint.plan))
    held = sum(values.nbytes for _, values in engine.held_weights())
    found = {"before": before, "grown": peak[0] - before, "seconds": time.perf_counter() - began}
    torch.save(found | {"held": held, "largest": 4 * largest}, folder / f"{layout.rank}.pt")


def first_weights(console: Console) -> None:
    """Print each rank's memory beside that of the shards that it fills, and of the largest tensor of the files."""
    table = Table(
        title=f"{MODEL} read from a folder of fp32 safetensors into {RANKS} ranks; MB of a rank, least to most"
    )
    for name in (
        "layout",
        "its fp32 weights",
        "private memory before",
        "grown while reading",
        "largest tensor",
        "seconds",
    ):
        table.add_column(name, justify="right" if name != "layout" else "left")
    with tempfile.TemporaryDirectory() as export:
        config, _ = read_model([f"model={MODEL}", "phases=full_224"])
        export_random(Path(export), config)
        for name, degrees in LAYOUTS.items():
            found = run_ranks(RANKS, read, Path(export), MODEL, degrees)
            spans = {key: sorted(each[key] for each in found) for key in found[0]}
            shown = [f"{spans[key][0] / MB:,.0f} to {spans[key][-1] / MB:,.0f}" for key in ("held", "before", "grown")]
            table.add_row(name, *shown, f"{spans['largest'][0] / MB:,.0f}", f"{spans['seconds'][-1]:.0f}")
    console.print(table)
