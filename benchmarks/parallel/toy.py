"""The 17 M parameter model that the sections measure, its micro-batches and one training step."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.world import run_world
from model.batch import MicroBatch
from model.config import ModelConfig, MT5Config, PaLIConfig, ViTConfig
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.distributed import launch
from parallel.engine.base import Engine
from parallel.engine.build import build_engine
from parallel.layout import Layout

VIT = ViTConfig(width=256, depth=4, mlp_dim=1024, num_heads=4, patch_size=14)
MT5 = MT5Config(
    d_model=256, d_ff=640, d_kv=64, num_heads=4, num_encoder_layers=4, num_decoder_layers=4, vocab_size=8192
)
MODEL = ModelConfig(image_size=112)
ROWS, ENCODER, DECODER = 2, 96, 32  # rows of a micro-batch; positions of a row
MICRO_BATCHES = 8  # of one step, over all data-parallel ranks
VISUAL = VIT.num_tokens(MODEL.image_size)
MB = 1e6  # bytes


def layout_name(settings: dict[str, Any]) -> str:
    """Return the settings of a layout as one text."""
    return " ".join(f"{k}={v}" for k, v in settings.items()) or "data parallel"


def build_toy(settings: dict[str, Any], vit: ViTConfig = VIT, mt5: MT5Config = MT5) -> Engine:
    """Build the benchmark's model for a layout. ZeRO-3 gathers all of it, so the byte formulas are exact."""
    layout = Layout.start(ParallelConfig(param_persistence_threshold=0, timeout_s=300, **settings), launch())
    freeze = ["patches.*", "vit_block_*"] if layout.config.replicate_frozen_vit else []
    return build_engine(PaLIConfig(vit, mt5, MODEL), OptimizerConfig(), layout, freeze=freeze)


def micro_batch(seed: int) -> MicroBatch:
    """Make rows of one image and text each, without padding."""
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
    """Take one training step of `micro_batches` over all data-parallel ranks; return its seconds."""
    own = range(engine.layout.data_parallel_rank, micro_batches, engine.layout.data_parallel_size)
    batches = [micro_batch(number) for number in own]
    engine.layout.barrier()
    began = time.perf_counter()
    engine.forward_backward(batches, micro_batches * ROWS * DECODER)
    engine.update(1e-3)
    return time.perf_counter() - began


def process_bytes(name: str) -> int:
    """Return VmRSS (memory now) or VmHWM (its peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def reset_peak() -> None:
    """Start the peak of VmHWM anew from the memory that this process has now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def run_ranks(size: int, function: Callable[..., None], *arguments: Any) -> list[dict[str, Any]]:
    """Run `function(folder, *arguments)` on every rank of a new world; return the `<rank>.pt` that each wrote."""
    with tempfile.TemporaryDirectory() as folder:
        run_world(size, function, Path(folder), *arguments)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(size)]
