"""Layouts over CPU processes: time, bytes sent, memory, the pipeline's bubble, and checkpoints.

    python -m benchmarks.parallel                       # all but materialize, a few minutes
    python -m benchmarks.parallel layouts --ranks 2 4   # step time, traffic and memory
    python -m benchmarks.parallel bubble gathers checkpoints
    python -m benchmarks.parallel materialize           # a 1.5 B model over 4 ranks: takes 12 GiB

Ranks share this machine's cores, so step times compare layouts of one size, and say nothing of a cluster. Bytes are
exact. For the bubble, stages sleep instead of computing, so that two cores can stand for eight.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.traffic import counted
from model.batch import MicroBatch
from model.config import ModelConfig, MT5Config, ViTConfig
from model.costs import Unit
from model.describe import read_sizes
from model.layers import parts_of
from model.mt5 import Bridge, DecoderBlock, EncoderBlock, EncoderNorm, Head
from model.vit import Patches, ViTBlock
from parallel.adafactor import factored
from parallel.checkpoint import Checkpointer
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.engine import Engine, build_engine
from parallel.launch import launch
from parallel.layout import Layout
from parallel.materialize import Blueprint
from parallel.pipeline import Sizes
from tests.distributed.world import run_world

VIT = ViTConfig(width=256, depth=4, mlp_dim=1024, num_heads=4, patch_size=14)
MT5 = MT5Config(
    d_model=256, d_ff=640, d_kv=64, num_heads=4, num_encoder_layers=4, num_decoder_layers=4, vocab_size=8192
)
MODEL = ModelConfig(image_size=112)
ROWS, ENCODER, DECODER, MICRO_BATCHES = 2, 96, 32, 8  # rows and positions of a micro-batch; micro-batches of all ranks
VISUAL = VIT.num_tokens(MODEL.image_size)
MB, FLOAT = 1e6, 4  # bytes

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


def name_of(settings: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in settings.items()) or "data parallel"


def engine_of(settings: dict[str, Any], vit: ViTConfig = VIT, mt5: MT5Config = MT5) -> Engine:
    """The benchmark's model, ZeRO-3 gathering all of it."""
    layout = Layout(ParallelConfig(persistent_elements=0, timeout_s=300, **settings), launch())
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
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    engine = engine_of(settings)
    layout = engine.layout
    step(engine)
    seconds = [step(engine) for _ in range(repeats)]
    groups = {"tensor": layout.tensor_group, "pipeline": layout.pipeline_group, "data": layout.data_group}
    with counted({**groups, "stage": layout.stage_group}) as sent:
        step(engine)
    torch.save(
        {"seconds": statistics.median(seconds), "sent": dict(sent), "peak": _memory("VmHWM") - before,
         "formula": formula(engine)},
        folder / f"{layout.rank}.pt",
    )  # fmt: skip


def _memory(name: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def formula(engine: Engine) -> Counter[str]:
    """Bytes that this rank sends in a step, by group.

    Data: gradients are summed once a step (all-reduce: twice the ring). DeepSpeed's stage 1 does that too, stage 2 in
    every micro-batch; each rank keeps its shard, and the updated weights are gathered. ZeRO-3 reduce-scatters and
    gathers in every micro-batch, in a pipeline once more for the backward pass, unless that follows at once (in the
    last stage; elsewhere DeepSpeed keeps up to 1e9 elements).
    Tensor: `residual`, and under sequence parallelism the gradients of what is applied to parts of sequences, summed.
    Pipeline: `messages`. Optimizer: `sums`.
    """
    layout, config = engine.layout, engine.layout.config
    data, tensor = layout.data_parallel_size, config.tensor
    share = MICRO_BATCHES // data
    ring = sum(map(_elements, engine.model.parameters())) * FLOAT * (data - 1) / data
    again = engine.pipeline is not None and len(engine.pipeline.stages) - 1 not in engine.pipeline.local_stages
    passes = {0: 2, 1: 3, 2: 2 * share + 1, 3: (2 + again) * share}[config.zero_stage]
    partial = 2 * FLOAT * sum(_elements(p) for p in engine.model.parameters() if p.partial_gradient)  # type: ignore
    reduced = sum(residual(unit, config.sequence) for _, unit in engine.model.units()) + partial
    sent = Counter(data=ring * passes, tensor=share * reduced * (tensor - 1) / tensor)
    return sent + messages(engine) + sums(engine)


def residual(unit: Unit, sequence: bool) -> int:
    """Bytes of the residual stream that a unit gathers or scatters over tensor-parallel ranks, forward and backward.

    An all-reduce is two: one after and, in the backward pass, one before each attention and MLP. Under sequence
    parallelism an input is gathered twice and its gradient scattered (three), an output scattered and its gradient
    gathered (two). Besides: what cross-attention reads, the embedding of each stream, the pictures, the head.
    """
    vision, encoder, decoder = (
        ROWS * n * d * FLOAT for n, d in ((VISUAL, VIT.width), (ENCODER, MT5.d_model), (DECODER, MT5.d_model))
    )
    plain, parts = {
        Patches: (0, vision),
        ViTBlock: (8 * vision, 10 * vision),
        Bridge: (2 * (encoder + decoder), 3 * (encoder + decoder) + ROWS * VISUAL * MT5.d_model * FLOAT),
        EncoderBlock: (8 * encoder, 10 * encoder),
        EncoderNorm: (0, 0),
        DecoderBlock: (12 * decoder + 2 * encoder, 15 * decoder + 3 * encoder),
        Head: (2 * decoder, 2 * decoder),
    }[type(unit)]
    return parts if sequence else plain


def _elements(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def sums(engine: Engine) -> Counter[str]:
    """Adafactor's two all-reduces: of every logical tensor that the stage updates two numbers, of a factored one its
    rows and columns. In the tensor-parallel group where ranks hold whole blocks, else over all of the stage."""
    optimizer, config = engine.optimizer, engine.optimizer.config
    numbers = sum(2 + (sum(shape) if factored(shape, config) else 0) for shape in optimizer.shapes.values())
    ranks = optimizer.group.size()
    group = "stage" if engine.layout.config.zero_stage else "tensor"
    return Counter({group: 2 * FLOAT * numbers * (ranks - 1) / ranks})


def messages(engine: Engine) -> Counter[str]:
    """Bytes that this rank sends to its neighbours in the pipeline in a step: of every micro-batch what its stages pass
    on, and the gradients of what they were given."""
    if engine.pipeline is None:
        return Counter()
    pipeline, sizes = engine.pipeline, Sizes.of(micro_batch(0))
    each = 0
    for stage in pipeline.local_stages:
        if stage + 1 < len(pipeline.stages):
            given = pipeline.travel.after(pipeline.stages[stage][-1], sizes, pipeline.dtype)
            each += sum(x.nbytes for x in given)
        if stage:
            taken = pipeline.travel.after(pipeline.stages[stage - 1][-1], sizes, pipeline.dtype)
            each += sum(x.nbytes for x in taken if x.requires_grad)
    return Counter(pipeline=each * MICRO_BATCHES // engine.layout.data_parallel_size)


def layouts(console: Console, sizes: list[int], repeats: int) -> None:
    for size in sizes:
        table = Table(
            title=f"{size} processes on {os.cpu_count()} cores: one step of {MICRO_BATCHES} micro-batches, fp32"
        )
        table.add_column("layout", no_wrap=True)
        groups = {"data": "data", "tensor": "tensor", "pipeline": "pipeline", "stage": "optimizer"}
        for column in ("step", "peak memory", *(c for name in groups.values() for c in (name, "formula"))):
            table.add_column(column, justify="right", no_wrap=True)
        for settings in LAYOUTS[size]:
            found = _run(size, measure, settings, repeats)
            sent: list[Counter[str]] = [_by_group(each["sent"]) for each in found]
            worst = max(range(size), key=lambda rank: sum(sent[rank].values()))
            expected = found[worst]["formula"]

            def shown(value: float) -> str:
                return f"{value / MB:.2f} MB" if value else "-"

            table.add_row(
                name_of(settings),
                f"{found[0]['seconds'] * 1e3:.0f} ms",
                f"{max(each['peak'] for each in found) / MB:.0f} MB",
                *(shown(value) for group in groups for value in (sent[worst][group], expected[group])),
            )
            kinds = ", ".join(
                f"{g} {k} {v / MB:.2f} MB" for (g, k), v in sorted(found[worst]["sent"].items()) if v > 1e4
            )
            console.print(f"[dim]{name_of(settings)}: {kinds}[/dim]")
        console.print(table)


def _by_group(sent: dict[tuple[str, str], float]) -> Counter[str]:
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
            f"{max(_by_group(each['sent'])['data'] for each in found) / MB:.2f} MB",
        )
    console.print(table)


# ---- materialisation -------------------------------------------------------------------------------------------------


class Enough(Exception):
    """All shards are there."""


def built(folder: Path, model: str) -> None:
    """Peak memory of a rank while its shards are made; what ZeRO adds for training comes after."""
    from parallel import zero

    materialize, began = zero.materialize, time.perf_counter()
    sizes = read_sizes([f"model={model}", "stage=full_224"])
    layout = Layout(ParallelConfig(zero_stage=3, timeout_s=1800), launch())
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")

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
    units = [[part.shape.numel() for _, part in parts_of(unit)] for _, unit in blueprint.plan.units()]
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
    chosen = parser.parse_args()
    if unknown := set(chosen.sections) - set(SECTIONS):
        parser.error(f"{', '.join(sorted(unknown))}: no such section; choose from {', '.join(SECTIONS)}")
    console = Console(width=170)
    if "layouts" in chosen.sections:
        layouts(console, chosen.ranks, chosen.repeats)
    if "bubble" in chosen.sections:
        bubble(console)
    if "gathers" in chosen.sections:
        gathers(console, chosen.repeats)
    if "checkpoints" in chosen.sections:
        checkpoints(console)
    if "materialize" in chosen.sections:
        materialize(console)


if __name__ == "__main__":
    main()
