"""Measure the pipeline's bubble: the share of a step in which a stage waits."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.parallel.toy import DECODER, MT5, ROWS, VIT, build_toy, micro_batch, run_ranks, step

FORWARD_S, BACKWARD_S = 0.2, 0.4


def asleep(folder: Path, settings: dict[str, Any], micro_batches: int) -> None:
    """Time a step whose stages sleep; the model is as deep as the toy but so narrow that its compute is negligible."""
    engine = build_toy(settings, replace(VIT, width=32, mlp_dim=64), replace(MT5, d_model=32, d_ff=64, d_kv=8))
    pipeline = engine.pipeline
    assert pipeline is not None
    step(engine, micro_batches)
    stages = settings.get("virtual_stages", 1)
    backward = pipeline.backward

    def slow_backward(loss: torch.Tensor) -> None:
        time.sleep(BACKWARD_S / stages)
        backward(loss)

    pipeline.backward = slow_backward
    engine.model.register_forward_pre_hook(lambda *_: time.sleep(FORWARD_S / stages))
    batches = [micro_batch(number) for number in range(micro_batches)]
    engine.layout.barrier()
    began = time.perf_counter()
    engine.forward_backward(batches, micro_batches * ROWS * DECODER)
    dist.barrier()
    torch.save({"seconds": time.perf_counter() - began}, folder / f"{engine.layout.rank}.pt")


def bubble(console: Console) -> None:
    """Print the measured share of waiting beside the formula, for GPipe, 1F1B and interleaved 1F1B."""
    table = Table(title="pipeline bubble: the share of a step in which a stage waits (0.2 s forward, 0.4 s backward)")
    for column in ("stages", "micro-batches", "schedule", "measured", "(p-1)/(v m+p-1)"):
        table.add_column(column, justify="right", no_wrap=True)
    for stages, micro_batches in ((2, 4), (2, 8), (4, 4), (4, 8)):
        for schedule in ({"schedule": "gpipe"}, {}, {"virtual_stages": 2}):
            found = run_ranks(stages, asleep, {"pipeline": stages, **schedule}, micro_batches)
            busy = micro_batches * (FORWARD_S + BACKWARD_S)
            virtual = schedule.get("virtual_stages", 1)
            assert isinstance(virtual, int)
            table.add_row(
                str(stages),
                str(micro_batches),
                "interleaved x 2" if virtual > 1 else str(schedule.get("schedule", "1f1b")),
                f"{1 - busy / max(each['seconds'] for each in found):.1%}",
                f"{(stages - 1) / (virtual * micro_batches + stages - 1):.1%}",
            )
    console.print(table)
