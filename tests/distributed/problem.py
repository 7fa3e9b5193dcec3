"""A small PaLI and its batches, the same for every layout: what one process computes is what all layouts must."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from model.batch import MicroBatch
from model.config import ModelConfig, MT5Config, ViTConfig
from parallel.checkpoint import held_weights
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.engine import Engine, build_engine
from parallel.launch import launch
from parallel.layout import Layout

VIT = ViTConfig(width=64, depth=2, mlp_dim=160, num_heads=4, patch_size=14)
MT5 = MT5Config(d_model=128, d_ff=192, d_kv=16, num_heads=4, num_encoder_layers=2, num_decoder_layers=2, vocab_size=256)
MODEL = ModelConfig(image_size=28, loss_chunk=7)
FROZEN_VIT = ["patches.*", "vit_block_*", "bridge.vit_norm.*"]
STEPS, MICRO_BATCHES, NUM_OBJECTIVES = 5, 4, 3
LEARNING_RATES = {"adafactor": 1e-2, "adamw": 1e-3}


@dataclass
class Case:
    """One way to train: a layout, and what is trained how."""

    tensor: int = 1
    sequence: bool = False
    zero_stage: int = 0
    recompute: str = "none"
    freeze: list[str] = field(default_factory=list)
    optimizer: str = "adafactor"
    precision: str = "fp32"

    def layout(self) -> Layout:
        parallel = ParallelConfig(
            tensor=self.tensor,
            sequence=self.sequence,
            zero_stage=self.zero_stage,
            recompute=self.recompute,
            timeout_s=120,
        )
        return Layout(parallel, launch())

    def engine(self, layout: Layout) -> Engine:
        optimizer = OptimizerConfig(name=self.optimizer, gradient_clipping=0.5)
        return build_engine(
            VIT,
            MT5,
            MODEL,
            optimizer,
            layout=layout,
            num_objectives=NUM_OBJECTIVES,
            precision=self.precision,
            freeze=self.freeze,
            seed=1,
        )


def micro_batches(step: int) -> list[MicroBatch]:
    """The global batch of a step: packed rows, rows with two images, text-only rows, one micro-batch without images."""
    generator = torch.Generator().manual_seed(100 + step)
    return [_micro_batch(generator, with_images=number != 2) for number in range(MICRO_BATCHES)]


def _micro_batch(generator: torch.Generator, with_images: bool) -> MicroBatch:
    rows, length, targets = 3, 16, 8

    def tokens(*shape: int) -> Tensor:
        return torch.randint(2, MT5.vocab_size, shape, generator=generator)

    encoder_segments = torch.tensor([[1] * 7 + [2] * 8 + [0], [1] * 14 + [0] * 2, [1] * 5 + [2] * 6 + [3] * 5])
    decoder_segments = torch.tensor([[1] * 3 + [2] * 4 + [0], [1] * 6 + [0] * 2, [1] * 2 + [2] * 3 + [3] * 3])
    visual_index = torch.full((rows, length), -1)
    if with_images:  # row 0: one image for each of its examples; row 1: one example with two images; row 2: text only
        visual_index[0, :4], visual_index[0, 7:11] = torch.arange(4), torch.arange(4, 8)
        visual_index[1, :8] = torch.arange(8, 16)
    return MicroBatch(
        images=torch.randint(0, 256, (4, 28, 28, 3), generator=generator, dtype=torch.uint8),
        encoder_tokens=tokens(rows, length).masked_fill(visual_index >= 0, 0),
        encoder_segments=encoder_segments,
        visual_index=visual_index,
        decoder_tokens=tokens(rows, targets),
        decoder_targets=tokens(rows, targets),
        decoder_segments=decoder_segments,
        objectives=torch.randint(0, NUM_OBJECTIVES, (rows, targets), generator=generator),
    )


def train(engine: Engine, steps: range = range(STEPS)) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step; every data-parallel rank takes its share of the micro-batches."""
    curve = []
    for step in steps:
        batches = micro_batches(step)
        num_targets = sum(batch.num_targets for batch in batches)
        share = len(batches) // engine.layout.data_parallel_size
        first = engine.layout.data_parallel_rank * share
        totals = engine.forward_backward(batches[first : first + share], num_targets)
        curve.append((float(totals.loss), engine.update(LEARNING_RATES[type(engine.optimizer).__name__.lower()])))
    return curve


def weights(engine: Engine) -> dict[str, Tensor]:
    """Every logical weight, whole, fp32; gathered from all ranks (a collective)."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, shape in _shapes(engine):
        found[name] = torch.zeros(shape), torch.zeros(shape)
    for rectangle, values in held_weights(engine):
        where = tuple(slice(o, o + n) for o, n in zip(rectangle.offset, rectangle.size, strict=True))
        found[rectangle.name][0][where] += values.float().cpu()
        found[rectangle.name][1][where] += 1
    for total, count in found.values():
        dist.all_reduce(total)
        dist.all_reduce(count)
    assert all(bool((count > 0).all()) for _, count in found.values()), "an element is on no rank"
    return {name: total / count for name, (total, count) in found.items()}


def _shapes(engine: Engine) -> list[tuple[str, torch.Size]]:
    from model.layers import parts_of

    return [(part.name, part.shape) for _, part in parts_of(engine.model)]
