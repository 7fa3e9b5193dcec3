"""Draw docs/architecture.png from the code: the units, the cuts of a pipeline, and the tensors that stages send.

    python -m docs.draw_architecture
    python -m docs.draw_architecture output=/tmp/architecture.png

Every name and number of the figure is computed: units and costs by `model`, the cut by `parallel.plan.cut`, the sent
tensors by `parallel.pipeline`, the blocks of a parameter by `model.layers`. Nothing is started.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor

from common.command_line import parse, run_command
from common.files import beside
from common.values import PATH as IS_PATH
from model.costs import UnitCost, unit_costs
from model.describe import read_model
from model.layers import Part, parameter_info
from model.mt5 import Carry, EncoderBlock
from model.tensor_parallel import PlannedGroup, TensorParallel
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.pipeline.schedule import CarryPlan, CarrySizes
from parallel.plan.blueprint import plan_stages
from parallel.plan.cut import StageCost
from parallel.plan.memory import MemoryModel, StepShape

OVERRIDES = ("model=pali_17b", "phases=full_224")
PARALLEL = ParallelConfig(tensor=2, pipeline=4, zero_stage=1, micro_batch_size=8)
DATA_PARALLEL = 8
DTYPE = torch.bfloat16
PATH = Path(__file__).with_name("architecture.png")

INK, FAINT = "#2b2f36", "#8a9099"
COLORS = {"vit": "#4c78a8", "bridge": "#e3a53a", "encoder": "#54a075", "decoder": "#9a6fb0", "head": "#c8594f"}
PARTS = ("#2f6f4f", "#6fae8c", "#b5d6c3")  # query, key, value
LEFT, RIGHT, SLIM, GAP = 0.03, 0.97, 0.024, 0.005  # of the width of the figure; `SLIM` is a unit that is no block


@dataclass
class Options:
    """Options of this command."""

    output: str = field(default=str(PATH), metadata=IS_PATH)
    """File to write. By default the figure of this checkout."""


def tower(name: str) -> str:
    """Return the color's name of a unit."""
    return {"patches": "vit", "bridge": "bridge", "head": "head"}.get(name, name.split("_")[0])


def place(costs: Sequence[UnitCost]) -> dict[str, tuple[float, float]]:
    """Return the left edge and the width of every unit: blocks are as wide as their FLOPs, other units are slim."""
    kinds = [cost.name.rstrip("0123456789") for cost in costs]
    blocks = sum(cost.training_flops for cost in costs if "_block_" in cost.name)
    slim = sum("_block_" not in kind for kind in kinds)
    gaps = len(set(kinds)) - 1
    scale = (RIGHT - LEFT - SLIM * slim - GAP * gaps) / blocks
    places, x = {}, LEFT
    for cost, kind, before in zip(costs, kinds, [kinds[0], *kinds], strict=False):
        x += GAP * (kind != before)
        places[cost.name] = x, (scale * cost.training_flops if "_block_" in kind else SLIM)
        x += places[cost.name][1]
    return places


def draw_units(axes: Axes, places: dict[str, tuple[float, float]], costs: Sequence[UnitCost]) -> None:
    """Draw the row of units, with names and parameters below."""
    for name, (x, width) in places.items():
        axes.add_patch(Rectangle((x, 0.60), width, 0.13, fc=COLORS[tower(name)], ec="white", lw=0.7))
    for kind, members in groupby(costs, key=lambda cost: cost.name.rstrip("0123456789")):
        found = list(members)
        first, last = places[found[0].name], places[found[-1].name]
        middle = (first[0] + last[0] + last[1]) / 2
        size = sum(cost.cost.parameters for cost in found)
        label = kind.rstrip("_")
        if len(found) > 1:
            axes.text(
                middle, 0.665, f"{label}\n0 … {len(found) - 1}", ha="center", va="center", color="white", fontsize=10.5,
                weight="bold", bbox={"fc": COLORS[tower(found[0].name)], "ec": "none", "pad": 3},
            )  # fmt: skip
            axes.text(middle, 0.585, f"{size / 1e9:.2f} B parameters", ha="center", va="top", color=FAINT, fontsize=9)
        else:
            axes.text(middle, 0.665, label, ha="center", va="center", rotation=90, color="white", fontsize=9)


def draw_inputs(axes: Axes, places: dict[str, tuple[float, float]]) -> None:
    """Draw the fields of the micro-batch above the units that read them."""
    box = FancyBboxPatch(
        (LEFT, 0.875), RIGHT - LEFT, 0.055, boxstyle="round,pad=0,rounding_size=0.012", fc="#f2f3f5", ec="#cfd3d8"
    )
    axes.add_patch(box)
    axes.text(
        LEFT, 0.948, "a micro-batch, which every rank of a replica has (texts and masks everywhere, pixels on stage 0)",
        va="center", color=INK, fontsize=10,
    )  # fmt: skip
    ends = {name: (x, x + width) for name, (x, width) in places.items()}
    spans = {
        "images": ends["patches"],
        "encoder_tokens, visual_index,\ndecoder_tokens": ends["bridge"],
        "encoder_segments": (ends["encoder_block_0"][0] + 0.035, ends["encoder_norm"][0]),
        "encoder_segments,\ndecoder_segments": (ends["decoder_block_0"][0], ends["head"][0] - 0.11),
        "decoder_targets,\nobjectives": ends["head"],
    }
    for text, (start, end) in spans.items():
        middle = (start + end) / 2
        align = {"images": "left", "decoder_targets,\nobjectives": "right"}.get(text, "center")
        x = {"left": start + 0.006, "right": end - 0.004}.get(align, middle)
        axes.text(x, 0.9025, text, ha=align, va="center", fontsize=8.5, color=INK, family="monospace", linespacing=1.0)
        axes.add_patch(
            FancyArrowPatch((middle, 0.872), (middle, 0.737), arrowstyle="-|>", mutation_scale=10, lw=1, color=FAINT)
        )


def shapes(tensors: Sequence[Tensor]) -> list[str]:
    """Describe the tensors of a carry, one a line, and their size."""
    names = ("vision",) if len(tensors) == 1 else Carry._fields
    lines = [f"{name} {list(x.shape)}" for name, x in zip(names, tensors, strict=True)]
    return [*lines, f"= {sum(x.numel() * x.element_size() for x in tensors) / 2**20:.1f} MiB in bf16"]


def draw_cuts(axes: Axes, places: dict[str, tuple[float, float]], stages: Sequence[StageCost], plan: CarryPlan) -> None:
    """Draw the pipeline's cuts, the cost of each stage, and the carry that is sent at each cut."""
    flops = sum(stage.flops for stage in stages)
    shape = StepShape.from_one_example(read_model(OVERRIDES)[0], PARALLEL, DTYPE).micro_batch
    sizes = CarrySizes(shape.images, shape.rows, shape.encoder_tokens, shape.decoder_tokens)
    edges = [places[stage.units[0]][0] for stage in stages] + [RIGHT]
    for number, stage in enumerate(stages):
        start, end = edges[number] + 0.004, edges[number + 1] - 0.004
        axes.plot([start, start, end, end], [0.515, 0.50, 0.50, 0.515], color=INK, lw=1.1)
        axes.text(
            (start + end) / 2, 0.487, f"stage {number}", ha="center", va="top", color=INK, fontsize=11, weight="bold"
        )
        text = f"{stage.flops / flops:.0%} of the FLOPs\n{stage.memory_bytes / 2**30:.0f} GiB a rank"
        axes.text((start + end) / 2, 0.457, text, ha="center", va="top", color=FAINT, fontsize=8.5)
        if number + 1 == len(stages):
            continue
        x = edges[number + 1]
        axes.plot([x, x], [0.40, 0.775], color=INK, lw=1.3, ls=(0, (3, 2)))
        axes.add_patch(
            FancyArrowPatch(
                (x - 0.028, 0.757), (x + 0.03, 0.757), arrowstyle="-|>", mutation_scale=13, lw=1.6, color=INK
            )
        )
        text = "\n".join(shapes(plan.after(stage.units[-1], sizes, DTYPE)))
        axes.text(
            x, 0.39, text, ha="center", va="top", fontsize=8, color=INK, family="monospace", linespacing=1.25,
            bbox={"fc": "white", "ec": "#cfd3d8", "boxstyle": "round,pad=0.4"},
        )  # fmt: skip


def draw_parameter(axes: Axes, parts: Sequence[Part]) -> None:
    """Draw one fused parameter of a tensor-parallel rank, and the logical tensors that its blocks belong to."""
    shape = [sum(part.block[0] for part in parts), parts[0].block[1]]
    axes.text(LEFT, 0.245, "one parameter, three logical tensors", va="center", color=INK, fontsize=11, weight="bold")
    axes.text(
        LEFT, 0.212, "encoder_block_0.attention_in.weight\non tensor-parallel rank 1 of 2: "
        f"{shape}", va="top", color=INK, fontsize=8.5, family="monospace", linespacing=1.4,
    )  # fmt: skip
    height, left = 0.038, 0.335
    for i, part in enumerate(parts):
        y, color = 0.19 - i * (height + 0.004), PARTS[i]
        axes.add_patch(Rectangle((left, y), 0.075, height, fc=color, ec="white"))
        start, end = part.offset[0], part.offset[0] + part.block[0]
        axes.add_patch(FancyArrowPatch((left + 0.078, y + height / 2), (left + 0.118, y + height / 2),
                                       arrowstyle="-|>", mutation_scale=9, lw=1, color=FAINT))  # fmt: skip
        x, whole = left + 0.122, 0.11
        axes.add_patch(Rectangle((x, y), whole, height, fc="#eef1ee", ec="#cfd3d8"))
        rows = whole / part.shape[0]
        axes.add_patch(Rectangle((x + start * rows, y), (end - start) * rows, height, fc=color, ec="none"))
        axes.text(
            x + whole + 0.008, y + height / 2, f"{part.name} {list(part.shape)}, rows {start} … {end - 1}",
            va="center", fontsize=8.5, family="monospace", color=INK,
        )  # fmt: skip
    axes.text(
        LEFT, 0.045, "Optimizer, checkpoint and initial values work on logical tensors, so they do not depend on the "
        "layout. ZeRO divides the parameter's flat memory over the data-parallel ranks;\n"
        "a rank's share is a few rectangles of logical tensors, and a checkpoint stores those by name and offset.",
        va="center", color=INK, fontsize=9,
    )  # fmt: skip


def main(words: Sequence[str]) -> None:
    """Draw the figure."""
    output = Path(parse(words, Options).output)
    config, frozen = read_model(OVERRIDES)
    step = StepShape.from_one_example(config, PARALLEL, DTYPE)
    memory = MemoryModel(PARALLEL, OptimizerConfig(), step, DATA_PARALLEL)
    plan, stages = plan_stages(config, frozen, memory)
    costs = list(unit_costs(plan.units(), step.micro_batch))
    with torch.device("meta"):
        block = EncoderBlock(config.mt5, config.model, TensorParallel(PlannedGroup(num_ranks=2, rank=1)))

    figure = Figure(figsize=(14, 8.2), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
    title = (
        f"{' '.join(OVERRIDES)}, parallel.pipeline={PARALLEL.pipeline}, parallel.tensor={PARALLEL.tensor}, "
        f"parallel.zero_stage={PARALLEL.zero_stage}, {PARALLEL.micro_batch_size} rows in a micro-batch, "
        f"{DATA_PARALLEL} replicas; blocks are as wide as their training FLOPs"
    )
    axes.text(0.5, 0.982, title, ha="center", va="center", color=FAINT, fontsize=9.5)
    places = place(costs)
    draw_inputs(axes, places)
    draw_units(axes, places, costs)
    draw_cuts(axes, places, stages, CarryPlan(plan, PARALLEL))
    axes.plot([LEFT, RIGHT], [0.275, 0.275], color="#dfe2e6", lw=1)
    draw_parameter(axes, parameter_info(block.attention_in.weight).parts)
    with beside(output) as scratch:
        figure.savefig(scratch, format="png")


if __name__ == "__main__":
    run_command(main)
