"""Print memory, disk and GPUs that each model size needs, from the memory model that also cuts the pipeline.

    python -m benchmarks.sizes
    python -m benchmarks.sizes models=[pali_3b] gpu_gib=37 micro_batch_size=4

Nothing is built or measured: shapes are planned on `meta`. A row is a phase of the paper's recipe in bf16 with
Adafactor, ZeRO-3 and recomputed blocks. The prediction leaves out ZeRO-3's gathered units and buffers of collectives,
so `gpu_gib` is well below what a GPU has.
"""

from dataclasses import dataclass, field, replace

import torch

from common.command_line import parse, run_command
from model.config import PaLIConfig
from model.describe import read_model
from model.layers import parameter_parts
from model.pali import PaLI
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.plan.blueprint import plan_stages
from parallel.plan.memory import MemoryModel, StepShape

FROZEN_VIT = ["patches.*", "vit_block_*", "bridge.vit_norm.*"]
PHASES = {"224 px, ViT frozen": (224, FROZEN_VIT, 1), "588 px, all trained": (588, [], 8)}  # batch divided by the last
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
NODE = 8  # GPUs
TENSOR = {"pali_15b": 4, "pali_17b": 4}  # as in conf/experiment; 1 for the others
BF16, FP32 = 2, 4  # bytes


@dataclass
class Options:
    """Print memory, disk and GPUs that each model size needs."""

    models: list[str] = field(
        default_factory=lambda: ["pali_700m", "pali_1_5b", "pali_3b", "pali_5b", "pali_15b", "pali_17b"]
    )
    """Files of conf/model."""
    gpu_gib: float = 60.0
    """Memory of a GPU that the prediction may fill, in GiB; 60 is for GPUs of 80 GB."""
    micro_batch_size: int = 8
    """Rows of a forward pass at 224 px, each of one image; an eighth of it at 588 px."""


def rank_gib(config: PaLIConfig, frozen: list[str], parallel: ParallelConfig, gpus: int) -> tuple[PaLI, float]:
    """Return the plan of a phase, and the predicted GiB of a rank on this number of GPUs."""
    step = StepShape.from_one_example(config, parallel, torch.bfloat16)
    memory = MemoryModel(parallel, OptimizerConfig(), step, gpus // parallel.tensor)
    plan, stages = plan_stages(config, frozen, memory)
    return plan, max(stage.memory_bytes for stage in stages) / 2**30


def phase_row(name: str, phase: str, options: Options) -> list[str]:
    """Return the table's cells of one phase of a model."""
    image_size, frozen, divisor = PHASES[phase]
    (config, _), tensor = read_model([f"model={name}"]), TENSOR.get(name, 1)
    config = replace(config, model=replace(config.model, image_size=image_size))
    rows = max(1, options.micro_batch_size // divisor)
    parallel = ParallelConfig(
        tensor=tensor, sequence=tensor > 1, zero_stage=3, recompute="block", micro_batch_size=rows
    )
    fewest, found = None, {}
    for gpus in (gpus for gpus in GPUS if gpus >= tensor):
        plan, found[gpus] = rank_gib(config, frozen, parallel, gpus)
        fewest = fewest or (gpus if found[gpus] <= options.gpu_gib else None)
        if fewest and gpus >= NODE:
            break
    parts = [(part.shape.numel(), parameter.requires_grad) for parameter, part in parameter_parts(plan)]
    total = sum(number for number, _ in parts)
    return [
        name,
        f"{total / 1e9:.2f} B",
        f"{total * BF16 / 1e9:.1f} GB",
        f"{sum(number * (FP32 if trained else BF16) for number, trained in parts) / 1e9:.0f} GB",
        phase,
        f"{fewest} ({found[fewest]:.0f} GiB)" if fewest else f"more than {GPUS[-1]}",
        f"{found[NODE]:.1f} GiB",
    ]


def main(options: Options) -> None:
    """Print the table as Markdown."""
    heads = ["model", "parameters", "weights, bf16", "checkpoint", "phase",
             f"fewest GPUs within {options.gpu_gib:.0f} GiB each", f"each of {NODE} GPUs"]  # fmt: skip
    print("| " + " | ".join(heads) + " |\n|---|---:|---:|---:|---|---:|---:|")
    for name in options.models:
        for phase in PHASES:
            print("| " + " | ".join(phase_row(name, phase, options)) + " |")


if __name__ == "__main__":
    run_command(lambda words: main(parse(words, Options)))
