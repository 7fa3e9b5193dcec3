"""Layouts over CPU processes: time, bytes sent, memory, the pipeline's bubble, and checkpoints.

    python -m benchmarks.parallel                       # all but materialize, a few minutes
    python -m benchmarks.parallel layouts --ranks 2 4   # step time, traffic and memory; --csv: of every rank
    python -m benchmarks.parallel bubble gathers checkpoints
    python -m benchmarks.parallel materialize           # a 1.5 B model over 4 ranks: takes 12 GiB

Ranks share this machine's cores, so step times compare layouts of one size, and say nothing of a cluster. Bytes are
exact. For the bubble, stages sleep instead of computing, so that two cores can stand for eight.
"""

import argparse
import csv
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.formulas import FLOAT, Bytes, expected_bytes
from benchmarks.traffic import counted
from common.terminal import use_utf8
from model.batch import MicroBatch
from model.config import ModelConfig, MT5Config, ViTConfig
from model.describe import read_sizes
from model.layers import parameter_parts
from parallel.checkpoint.checkpointer import Checkpointer
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.distributed import launch
from parallel.engine.base import Engine, build_engine
from parallel.layout import Layout
from parallel.plan.blueprint import Blueprint
from tests.distributed.world import run_world

VIT = ViTConfig(width=256, depth=4, mlp_dim=1024, num_heads=4, patch_size=14)
MT5 = MT5Config(
    d_model=256, d_ff=640, d_kv=64, num_heads=4, num_encoder_layers=4, num_decoder_layers=4, vocab_size=8192
)
MODEL = ModelConfig(image_size=112)
ROWS, ENCODER, DECODER, MICRO_BATCHES = 2, 96, 32, 8  # rows and positions of a micro-batch; micro-batches of all ranks
VISUAL = VIT.num_tokens(MODEL.image_size)
MB = 1e6  # bytes

LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [{}, {"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 3}, {"tensor": 2}, {"tensor": 2, "sequence": True},
        {"pipeline": 2}, {"pipeline": 2, "schedule": "gpipe"}, {"pipeline": 2, "virtual_stages": 2}],
    4: [{"zero_stage": 1}, {"zero_stage": 3}, {"tensor": 2, "zero_stage": 1}, {"tensor": 4, "sequence": True},
        {"pipeline": 4}, {"pipeline": 2, "zero_stage": 1}, {"pipeline": 2, "zero_stage": 2},
        {"pipeline": 2, "zero_stage": 3}],
    8: [{"zero_stage": 3}, {"tensor": 2, "pipeline": 2, "zero_stage": 1},
        {"tensor": 2, "pipeline": 2, "zero_stage": 3, "sequence": True}, {"pipeline": 4, "zero_stage": 1},
        {"pipeline": 4, "zero_stage": 3}],
}  # fmt: skip
SECTIONS = ("layouts", "bubble", "gathers", "checkpoints", "materialize")
MATERIALIZED, MATERIALIZED_RANKS = "pali_1_5b", 4
CSV_COLUMNS = ["ranks", "layout", "step_ms", "rank", "peak_memory_mb", "group", "kind", "sent_mb", "formula_mb"]
GROUPS = {"data": "data", "tensor": "tensor", "pipeline": "pipeline", "stage": "optimizer"}  # as the table calls them
SMALL = 1e4  # bytes of a step's norms, flags and sums of the vocabulary-parallel loss, which no formula counts


def name_of(settings: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in settings.items()) or "data parallel"


def engine_of(settings: dict[str, Any], vit: ViTConfig = VIT, mt5: MT5Config = MT5) -> Engine:
    """The benchmark's model, ZeRO-3 gathering all of it."""
    layout = Layout(ParallelConfig(param_persistence_threshold=0, timeout_s=300, **settings), launch())
    return build_engine(vit, mt5, MODEL, OptimizerConfig(), layout=layout, num_objectives=1)


def micro_batch(seed: int) -> MicroBatch:
    """Rows of one image and text, nothing padded."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(2, MT5.vocab_size, (ROWS, length), generator=generator)

    visual_index = torch.full((ROWS, ENCODER), -1)
    visual_index[:, :VISUAL] = torch.arange(ROWS * VISUAL).view(ROWS, VISUAL)
    size = MODEL.image_size
    return MicroBatch(
        images=torch.randint(0, 256, (ROWS, size, size, 3), generator=generator, dtype=torch.uint8),
        encoder_tokens=ids(ENCODER).masked_fill(visual_index >= 0, 0),
        encoder_segments=torch.ones(ROWS, ENCODER, dtype=torch.long),
        visual_index=visual_index,
        decoder_tokens=ids(DECODER),
        decoder_targets=ids(DECODER),
        decoder_segments=torch.ones(ROWS, DECODER, dtype=torch.long),
        objectives=torch.zeros(ROWS, DECODER, dtype=torch.long),
    )


def step(engine: Engine, micro_batches: int = MICRO_BATCHES) -> float:
    """Seconds of one training step of `micro_batches` over all data-parallel ranks."""
    own = range(engine.layout.data_parallel_rank, micro_batches, engine.layout.data_parallel_size)
    batches = [micro_batch(number) for number in own]
    engine.layout.barrier()
    began = time.perf_counter()
    engine.forward_backward(batches, micro_batches * ROWS * DECODER)
    engine.update(1e-3)
    return time.perf_counter() - began


# ---- step time, traffic, memory --------------------------------------------------------------------------------------


def measure(folder: Path, settings: dict[str, Any], repeats: int) -> None:
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    engine = engine_of(settings)
    step(engine)
    seconds = [step(engine) for _ in range(repeats)]
    peak = _memory("VmHWM") - before
    found = {"seconds": statistics.median(seconds), "peak": peak, **traffic(engine)}
    torch.save(found, folder / f"{engine.layout.rank}.pt")


def traffic(engine: Engine) -> dict[str, Bytes]:
    """What this rank sends in a step, and what it should."""
    layout = engine.layout
    groups = {"tensor": layout.tensor_group, "pipeline": layout.pipeline_group, "data": layout.data_group}
    with counted({**groups, "stage": layout.stage_group}) as sent:
        step(engine)
    return {"sent": sent, "formula": expected_bytes(engine, VIT, MT5, micro_batch(0), MICRO_BATCHES)}


def _memory(name: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def layouts(console: Console, sizes: list[int], repeats: int, csv_at: Path | None) -> None:
    """The table, by group for the rank that sends most; every rank and kind goes to `csv_at`."""
    lines: list[Sequence[object]] = []
    for size in sizes:
        title = f"{size} processes on {os.cpu_count()} cores: one step of {MICRO_BATCHES} micro-batches, fp32"
        table = Table(title=title)
        table.add_column("layout", no_wrap=True)
        for column in ("step", "peak memory", *(c for name in GROUPS.values() for c in (name, "formula"))):
            table.add_column(column, justify="right", no_wrap=True)
        for settings in LAYOUTS[size]:
            found = _run(size, measure, settings, repeats)
            for rank, each in enumerate(found):
                start = size, name_of(settings), f"{1e3 * each['seconds']:.0f}", rank, f"{each['peak'] / MB:.0f}"
                for group, kind, sent_bytes, expected in sent_and_expected(each):
                    lines.append((*start, group, kind, f"{sent_bytes / MB:.3f}", f"{expected / MB:.3f}"))
            worst = max(found, key=lambda each: sum(each["sent"].values()))
            sent, formula = by_group(worst["sent"]), by_group(worst["formula"])
            table.add_row(
                name_of(settings),
                f"{found[0]['seconds'] * 1e3:.0f} ms",
                f"{max(each['peak'] for each in found) / MB:.0f} MB",
                *(f"{x[group] / MB:.2f} MB" if x[group] else "-" for group in GROUPS for x in (sent, formula)),
            )
        console.print(table)
    if csv_at is not None:
        with csv_at.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([CSV_COLUMNS, *lines])
        console.print(f"every rank and kind: {csv_at}")


def sent_and_expected(found: dict[str, Any]) -> list[tuple[str, str, float, float]]:
    """(group, kind, bytes sent, bytes by the formula) of one rank, without flags and norms, which no formula counts."""
    sent, formula = found["sent"], found["formula"]
    kept = sorted(key for key in sent | formula if key in formula or sent[key] > SMALL)
    return [(*key, sent[key], formula[key]) for key in kept]


def by_group(sent: Bytes) -> Counter[str]:
    total = Counter[str]()
    for (group, _), value in sent.items():
        total[group] += value
    return total


def _run(size: int, function: Callable[..., None], *arguments: Any) -> list[dict[str, Any]]:
    """What each rank of a fresh world leaves."""
    with tempfile.TemporaryDirectory() as folder:
        run_world(size, function, Path(folder), *arguments)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(size)]


# ---- the pipeline's bubble -------------------------------------------------------------------------------------------

FORWARD_S, BACKWARD_S = 0.2, 0.4


def asleep(folder: Path, settings: dict[str, Any], micro_batches: int) -> None:
    """A step whose stages sleep; real work, of towers as deep and far narrower, is small beside it."""
    engine = engine_of(settings, replace(VIT, width=32, mlp_dim=64), replace(MT5, d_model=32, d_ff=64, d_kv=8))
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
    table = Table(title="pipeline bubble: the share of a step in which a stage waits (0.2 s forward, 0.4 s backward)")
    for column in ("stages", "micro-batches", "schedule", "measured", "(p-1)/(v m+p-1)"):
        table.add_column(column, justify="right", no_wrap=True)
    for stages, micro_batches in ((2, 4), (2, 8), (4, 4), (4, 8)):
        for schedule in ({"schedule": "gpipe"}, {}, {"virtual_stages": 2}):
            found = _run(stages, asleep, {"pipeline": stages, **schedule}, micro_batches)
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


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def save(folder: Path, settings: dict[str, Any], checkpoints: Path) -> None:
    engine = engine_of(settings)
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
    engine, taken = engine_of(settings), []
    for _ in range(3):
        engine.layout.barrier()
        began = time.perf_counter()
        assert Checkpointer(checkpoints).load_latest(engine)
        taken.append(time.perf_counter() - began)
    torch.save({"seconds": min(taken)}, folder / f"{engine.layout.rank}.pt")


def plain(folder: Path, _: dict[str, Any], size: int) -> None:
    """torch.save and torch.load of as many bytes in one process, on disk before it counts."""
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
    table = Table(title="checkpoints: whole, with SHA-256 made and checked, on disk (fsync); best of 3")
    for column in ("what", "layout", "size", "seconds", "MB/s"):
        table.add_column(column, justify="left" if column in ("what", "layout") else "right", no_wrap=True)
    layout = {"tensor": 2, "pipeline": 2, "zero_stage": 1}
    with tempfile.TemporaryDirectory() as kept:
        place = Path(kept) / "checkpoints"
        saved = _run(4, save, layout, place)
        size = sum(f.stat().st_size for f in (place / "step_00000003").iterdir())
        rows = [
            ("save: training waits", "4 ranks", layout, max(each["blocked"] for each in saved)),
            ("save: on disk", "4 ranks", layout, max(each["seconds"] for each in saved)),
            ("load", "4 ranks", layout, _run(4, load, layout, place)[0]["seconds"]),
        ]
        for ranks, other in ((2, {"zero_stage": 3}), (4, {"tensor": 4}), (1, {})):
            rows.append(
                ("reshard", f"{ranks} rank" + "s" * (ranks > 1), other, _run(ranks, load, other, place)[0]["seconds"])
            )
        alone = _run(1, plain, {}, size)[0]
        rows += [(f"torch.{verb}", "1 process", {}, alone[verb]) for verb in ("save", "load")]
    for what, ranks, settings, seconds in rows:
        where = f"{ranks}: {name_of(settings)}" if settings else ranks
        table.add_row(what, where, f"{size / MB:.0f} MB", f"{seconds:.2f} s", f"{size / MB / seconds:.0f}")
    console.print(table)


# ---- ZeRO-3 in a pipeline: gathered per micro-batch or kept ----------------------------------------------------------


def gathers(console: Console, repeats: int) -> None:
    """ZeRO-3 against ZeRO-1 inside the stages of a pipeline."""
    table = Table(title=f"2 stages x 2 data-parallel ranks, one step of {MICRO_BATCHES} micro-batches, fp32")
    for column in ("layout", "step", "peak memory", "data"):
        table.add_column(column, justify="left" if column == "layout" else "right", no_wrap=True)
    for settings in ({"zero_stage": 1}, {"zero_stage": 3}, {"zero_stage": 3, "gather": "step"}):
        found = _run(4, measure, {"pipeline": 2, **settings}, repeats)
        table.add_row(
            name_of({"pipeline": 2, **settings}),
            f"{found[0]['seconds'] * 1e3:.0f} ms",
            f"{max(each['peak'] for each in found) / MB:.0f} MB",
            f"{max(by_group(each['sent'])['data'] for each in found) / MB:.2f} MB",
        )
    console.print(table)


# ---- materialisation -------------------------------------------------------------------------------------------------


class Enough(Exception):
    """All shards are there."""


def built(folder: Path, model: str) -> None:
    """Peak memory of a rank while its shards are made; what ZeRO adds for training comes after."""
    from parallel.engine import zero

    materialize, began = zero.materialize, time.perf_counter()
    sizes = read_sizes([f"model={model}", "stage=full_224"])
    layout = Layout(ParallelConfig(zero_stage=3, timeout_s=1800), launch())
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")

    def watched(blueprint: Blueprint, *arguments: Any, **options: Any) -> None:
        materialize(blueprint, *arguments, **options)
        torch.save(
            {"peak": _memory("VmHWM") - before, "after": _memory("VmRSS") - before,
             "seconds": time.perf_counter() - began, "plan": _largest(blueprint)},
            folder / f"{layout.rank}.pt",
        )  # fmt: skip
        raise Enough

    zero.materialize = watched
    with suppress(Enough):
        build_engine(
            sizes.vit, sizes.mt5, sizes.model, OptimizerConfig(), layout=layout, num_objectives=1, precision="bf16"
        )


def _largest(blueprint: Blueprint) -> dict[str, int]:
    """Elements of the model, and bytes of its largest unit while it is filled: 16 bits of all, fp32 of one tensor."""
    units = [[part.shape.numel() for _, part in parameter_parts(unit)] for _, unit in blueprint.plan.units()]
    return {"elements": sum(map(sum, units)), "unit": max(2 * sum(parts) + FLOAT * max(parts) for parts in units)}


def materialize(console: Console) -> None:
    found = _run(MATERIALIZED_RANKS, built, MATERIALIZED)
    elements, unit = found[0]["plan"]["elements"], found[0]["plan"]["unit"]
    shard = 2 * elements / MATERIALIZED_RANKS
    table = Table(
        title=f"{MATERIALIZED} ({elements / 1e9:.2f} B parameters, {2 * elements / MB:,.0f} MB in bf16) made in ZeRO-3 "
        f"shards over {MATERIALIZED_RANKS} ranks, {found[0]['seconds']:.0f} s: memory of a rank beyond its imports"
    )
    for column in ("", "expected", *(f"rank {rank}" for rank in range(MATERIALIZED_RANKS))):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for what, expected, key in (
        ("peak: shard + largest unit", shard + unit, "peak"),
        ("afterwards: shard", shard, "after"),
    ):
        table.add_row(what, f"{expected / MB:,.0f} MB", *(f"{each[key] / MB:,.0f} MB" for each in found))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=list(SECTIONS[:-1]), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8], choices=[2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path, help="where layouts writes every rank's peak memory and bytes by kind")
    chosen = parser.parse_args()
    if unknown := set(chosen.sections) - set(SECTIONS):
        parser.error(f"{', '.join(sorted(unknown))}: no such section; choose from {', '.join(SECTIONS)}")
    console = Console(width=170)
    if "layouts" in chosen.sections:
        layouts(console, chosen.ranks, chosen.repeats, chosen.csv)
    if "bubble" in chosen.sections:
        bubble(console)
    if "gathers" in chosen.sections:
        gathers(console, chosen.repeats)
    if "checkpoints" in chosen.sections:
        checkpoints(console)
    if "materialize" in chosen.sections:
        materialize(console)


if __name__ == "__main__":
    use_utf8()
    main()
