"""Measure the pipeline's bubble: the share of a step in which a stage waits, beside the played schedule."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.parallel.toy import DECODER, MT5, ROWS, VIT, build_toy, micro_batch, run_ranks, step
from parallel.plan.actions import Pipeline
from parallel.plan.play import StageTime, play

FORWARD_S, BACKWARD_S = 0.4, 0.8  # of one micro-batch on a rank: far above the milliseconds of a message


@dataclass(frozen=True)
class Case:
    """A schedule to measure; rank r takes `slowness[r]` times as long as FORWARD_S and BACKWARD_S."""

    micro_batches: int
    slowness: tuple[float, ...]
    schedule: str = "1f1b"
    virtual_stages: int = 1

    @property
    def ranks(self) -> int:
        """Return the ranks of the pipeline."""
        return len(self.slowness)

    @property
    def pipeline(self) -> Pipeline:
        """Return the schedule in the form of the plan."""
        return Pipeline(self.ranks, self.virtual_stages, self.micro_batches, self.schedule)

    def times(self, rank: int) -> StageTime:
        """Return the seconds of each stage of a rank."""
        share = self.slowness[rank] / self.virtual_stages
        return StageTime(FORWARD_S * share, BACKWARD_S * share)


EVEN = [
    Case(micro_batches, (1.0,) * ranks, schedule, virtual_stages)
    for ranks in (2, 4)
    for micro_batches in (4, 8)
    for schedule, virtual_stages in (("gpipe", 1), ("1f1b", 1), ("1f1b", 2))
]
UNEVEN = [
    Case(8, (1.0, 2.0, 1.0, 1.0)),
    Case(8, (0.5, 1.0, 1.0, 1.5), "gpipe"),
    Case(8, (0.5, 1.0, 1.0, 1.5), "1f1b", 2),
]


def asleep(folder: Path, case: Case) -> None:
    """Time a step whose passes sleep until they have taken their time; the model is narrow, so its compute fits in."""
    settings = {"pipeline": case.ranks, "schedule": case.schedule, "virtual_stages": case.virtual_stages}
    engine = build_toy(settings, replace(VIT, width=32, mlp_dim=64), replace(MT5, d_model=32, d_ff=64, d_kv=8))
    pipeline, times = engine.pipeline, case.times(engine.layout.rank)
    assert pipeline is not None
    step(engine, case.micro_batches)
    pipeline.model.forward = lasting(times.forward_s, pipeline.model.forward)  # type: ignore[method-assign]
    pipeline.backward = lasting(times.backward_s, pipeline.backward)
    batches = [micro_batch(number) for number in range(case.micro_batches)]
    engine.layout.barrier()
    began = time.perf_counter()
    engine.forward_backward(batches, case.micro_batches * ROWS * DECODER)
    dist.barrier()
    torch.save({"seconds": time.perf_counter() - began}, folder / f"{engine.layout.rank}.pt")


def lasting(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, made to take `seconds`."""

    def slow(*arguments: Any) -> Any:
        end = time.perf_counter() + seconds
        result = function(*arguments)
        time.sleep(max(0.0, end - time.perf_counter()))
        return result

    return slow


def bubble(console: Console) -> None:
    """Print steps of sleeping stages beside the played schedule, and the share of waiting beside the formula."""
    table = Table(title=f"pipelines whose stages sleep ({FORWARD_S} s forward, {BACKWARD_S} s backward a rank)")
    for column in ("ranks", "micro-batches", "schedule", "times a rank", "step", "played", "deviation", "waiting"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("(p-1)/(v m+p-1)", justify="right")
    for case in EVEN + UNEVEN:
        measured = max(each["seconds"] for each in run_ranks(case.ranks, asleep, case))
        stages = [case.times(stage % case.ranks) for stage in range(case.pipeline.stages)]
        played = play(case.pipeline, stages).seconds
        busy = case.micro_batches * (FORWARD_S + BACKWARD_S) * sum(case.slowness) / case.ranks
        formula = (case.ranks - 1) / (case.virtual_stages * case.micro_batches + case.ranks - 1)
        table.add_row(
            str(case.ranks),
            str(case.micro_batches),
            f"interleaved x {case.virtual_stages}" if case.virtual_stages > 1 else case.schedule,
            "even" if case in EVEN else " ".join(f"{each:g}" for each in case.slowness),
            f"{measured:.3f} s",
            f"{played:.3f} s",
            f"{played / measured - 1:+.1%}",
            f"{1 - busy / measured:.1%}",
            f"{formula:.1%}" if case in EVEN else "-",
        )
    console.print(table)
