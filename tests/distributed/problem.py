"""A small PaLI and its batches, the same for every layout: what one process computes is what all layouts must."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.batch import MicroBatch
from model.classifier import COORDINATES, FIRST
from model.config import ClassifierConfig, ModelConfig, MT5Config, PaLIConfig, ViTConfig
from model.layers import parameter_parts
from model.loss import LossTotals
from model.pali import build, local_block
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.distributed import launch
from parallel.engine.base import Engine
from parallel.engine.build import build_engine
from parallel.layout import Layout

VIT = ViTConfig(width=64, depth=2, mlp_dim=160, num_heads=4, patch_size=14)
MT5 = MT5Config(d_model=128, d_ff=192, d_kv=16, num_heads=4, num_encoder_layers=2, num_decoder_layers=2, vocab_size=256)
MODEL = ModelConfig(image_size=28, loss_chunk=7)
FROZEN_VIT = ["patches.*", "vit_block_*", "bridge.vit_norm.*"]
FROZEN_DECODER = ["decoder_block_*", "head.*", "bridge.decoder_bias.*"]  # gradients come back through it
FROZEN_ENCODER = ["encoder_*", "bridge.e*"]
STEPS, MICRO_BATCHES, NUM_OBJECTIVES = 5, 8, 3
NUM_CLASSES = 20
PALI = PaLIConfig(VIT, MT5, MODEL, NUM_OBJECTIVES)
LEARNING_RATES = {"adafactor": 1e-2, "adamw": 1e-3}
PROMPTS = 4  # micro-batches that are answered: as many as there are data-parallel ranks at most
KEY_BIAS = 1e-4  # RMS; Adafactor moves what is nearly zero by its rate times 1e-3, five times, up or down
AVERAGE_DECAY = 0.75
EPSILON = 1e-6  # AdamW divides a gradient by its own size: one that is only rounding must stay below this


@dataclass
class Case:
    """One way to train: a layout over tensor x pipeline x data ranks, and what is trained how."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero_stage: int = 0
    sequence: bool = False
    recompute: str = "none"
    schedule: str = "1f1b"  # or gpipe, or interleaved: two stages on each rank
    freeze: list[str] = field(default_factory=list)
    optimizer: str = "adafactor"
    precision: str = "fp32"
    cut: list[str] = field(default_factory=list)
    param_persistence_threshold: int = 0  # ZeRO-3 gathers even the smallest tensor
    image_size: int = MODEL.image_size
    joined: bool = False  # the rows of a micro-batch become one, as on a CPU
    bias_per_layer: bool = False  # as umT5
    tower: str | None = None  # the only one: "mt5" of text, or "vit"
    head: str = "none"  # of the vit
    dropout_rate: float = 0.0
    replicate_frozen_vit: bool = False  # without a pipeline, of the images that are used alone: 4, 1 or none (a blank)

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def name(self) -> str:
        """What differs from one process, e.g. "tensor2 data4 zero1 sequence"."""
        numbers = {"tensor": self.tensor, "pipeline": self.pipeline, "data": self.data}
        words = [f"{name}{number}" for name, number in numbers.items() if number > 1]
        words += [self.schedule] * (self.pipeline > 1) + [f"zero{self.zero_stage}"] * (self.zero_stage > 0)
        words += ["sequence"] * self.sequence + [f"recompute-{self.recompute}"] * (self.recompute != "none")
        words += [f"frozen-{pattern.partition('_')[0].partition('.')[0]}" for pattern in self.freeze[:1]]
        words += [self.optimizer] * (self.optimizer != "adafactor")
        words += [self.precision] * (self.precision != "fp32") + ["cut-" + "-".join(self.cut)] * bool(self.cut)
        words += ["persistent"] * (self.param_persistence_threshold > 0)
        words += ["joined"] * self.joined + ["bias-per-layer"] * self.bias_per_layer
        words += [self.tower] * (self.tower is not None) + [self.head] * (self.head != "none")
        words += ["dropout"] * (self.dropout_rate > 0) + ["whole-vit"] * self.replicate_frozen_vit
        words += [f"image{self.image_size}"] * (self.image_size != MODEL.image_size)
        return " ".join(words) or "one process"

    def alone(self) -> "Case":
        """The same training in one process."""
        kept = ("freeze", "optimizer", "precision", "image_size", "bias_per_layer", "tower", "head", "dropout_rate")
        return Case(**{name: getattr(self, name) for name in kept})

    @property
    def sizes(self) -> tuple[int, bool]:
        """What decides the shapes of the tensors."""
        return self.image_size, self.bias_per_layer

    @property
    def pali(self) -> PaLIConfig:
        mt5 = replace(MT5, bias_per_layer=self.bias_per_layer)
        model = replace(MODEL, image_size=self.image_size, dropout_rate=self.dropout_rate)
        classifier = ClassifierConfig(self.head, NUM_CLASSES, -2.0)
        return replace(PALI, mt5=mt5, model=model, tower=self.tower, classifier=classifier)

    def layout(self) -> Layout:
        interleaved = self.schedule == "interleaved"
        parallel = ParallelConfig(
            tensor=self.tensor,
            pipeline=self.pipeline,
            virtual_stages=2 if interleaved else 1,
            schedule="1f1b" if interleaved else self.schedule,
            cut=self.cut,
            sequence=self.sequence,
            zero_stage=self.zero_stage,
            param_persistence_threshold=self.param_persistence_threshold,
            recompute=self.recompute,
            replicate_frozen_vit=self.replicate_frozen_vit,
            timeout_s=120,
        )
        return Layout.start(parallel, launch())

    def engine(self, layout: Layout) -> Engine:
        optimizer = OptimizerConfig(
            name=self.optimizer, epsilon=EPSILON, gradient_clipping=0.5, average_decay=AVERAGE_DECAY
        )
        return build_engine(
            self.pali,
            optimizer,
            layout,
            precision=self.precision,
            freeze=self.freeze,
            seed=1,
        )


def micro_batches(step: int, image_size: int = MODEL.image_size) -> list[MicroBatch]:
    """The global batch of a step: packed rows, rows with two images, text-only rows, one micro-batch without images,
    two of short examples, which attention takes apart. In step 1 the first half of it has no image, in step 3 all."""
    generator = torch.Generator().manual_seed(100 + step)
    without = {1: range(MICRO_BATCHES // 2), 3: range(MICRO_BATCHES)}.get(step, (2,))  # numbers of micro-batches
    return [
        _micro_batch(generator, number not in without, image_size, number in (4, 5)) for number in range(MICRO_BATCHES)
    ]


def _micro_batch(generator: torch.Generator, with_images: bool, image_size: int, short: bool) -> MicroBatch:
    n = VIT.num_tokens(image_size)
    rows, length, targets = 3, 2 * n + 8, 8

    def tokens(*shape: int) -> Tensor:
        return torch.randint(2, MT5.vocab_size, shape, generator=generator)

    first, second, third = [1] * (n + 3) + [2] * (n + 4) + [0], [1] * (2 * n + 6) + [0] * 2, [1] * 5 + [2] * 6
    encoder_segments = torch.tensor([first, second, third + [3] * (length - 11)])
    decoder_segments = torch.tensor([[1] * 3 + [2] * 4 + [0], [1] * 6 + [0] * 2, [1] * 2 + [2] * 3 + [3] * 3])
    visual_index = torch.full((rows, length), -1)
    if short:  # two of up to 8 positions in each row
        at = torch.arange(length)
        encoder_segments = torch.stack([(at < 8).long() + 2 * ((at >= 8) & (at < end)) for end in (16, 14, 15)])
        decoder_segments = torch.tensor([[1] * 4 + [2] * 4] * rows)
        if with_images and n <= 4:
            visual_index[1, :n] = torch.arange(n)
    elif with_images:  # row 0: one image for each of its examples; row 1: one example with two images; row 2: text only
        visual_index[0, :n], visual_index[0, n + 3 : 2 * n + 3] = torch.arange(n), torch.arange(n, 2 * n)
        visual_index[1, : 2 * n] = torch.arange(2 * n, 4 * n)
    return MicroBatch(
        images=torch.randint(0, 256, (4, image_size, image_size, 3), generator=generator, dtype=torch.uint8),
        encoder_tokens=tokens(rows, length).masked_fill(visual_index >= 0, 0),
        encoder_segments=encoder_segments,
        visual_index=visual_index,
        decoder_tokens=tokens(rows, targets),
        decoder_targets=tokens(rows, targets),
        decoder_segments=decoder_segments,
        objectives=torch.randint(0, NUM_OBJECTIVES, (rows, targets), generator=generator),
    )


def tower_batches(step: int, tower: str | None, image_size: int) -> list[MicroBatch]:
    """The global batch of a step for one tower alone: the same rows without images, or images with labels and boxes."""
    if tower == "vit":
        generator = torch.Generator().manual_seed(200 + step)
        return [_labeled_batch(generator, image_size, number == 2) for number in range(MICRO_BATCHES)]
    batches = micro_batches(step, image_size)
    return batches if tower is None else [replace(batch, images=batch.images[:0]) for batch in batches]


def _labeled_batch(generator: torch.Generator, image_size: int, empty: bool) -> MicroBatch:
    """Two rows of two images in slots out of order, the second row with one example only; or no example at all."""
    n = VIT.num_tokens(image_size)
    segments, at = torch.tensor([[1] * 7 + [2] * 7, [1] * 7 + [0] * 7]), torch.arange(14) % 7
    encoder_segments = torch.tensor([[1] * (n + 1) + [2] * (n + 1), [1] * (n + 1) + [0] * (n + 1)])
    visual_index = torch.full((2, 2 * n + 2), -1)
    visual_index[0, :n], visual_index[0, n + 1 : 2 * n + 1] = torch.arange(n, 2 * n), torch.arange(n)
    visual_index[1, :n] = torch.arange(3 * n, 4 * n)
    corners = torch.randint(0, COORDINATES // 2, (2, 14), generator=generator)  # ymin, xmin; ymax, xmax are beyond
    corners = corners + (at > 1) * COORDINATES // 2 + FIRST + NUM_CLASSES
    labels = torch.randint(FIRST, FIRST + NUM_CLASSES, (2, 14), generator=generator)
    images = torch.randint(0, 256, (4, image_size, image_size, 3), generator=generator, dtype=torch.uint8)
    targets = torch.where(at < 4, corners, labels)
    objectives = torch.randint(0, NUM_OBJECTIVES, (2, 2), generator=generator).repeat_interleave(7, 1)
    tokens = torch.zeros_like(visual_index)
    batch = MicroBatch(
        images, tokens, encoder_segments, visual_index, torch.zeros_like(targets), targets, segments, objectives
    )
    return batch.emptied() if empty else batch


def all_gathers(work: Callable[[], object]) -> int:
    """How many this rank takes part in while it does the work."""
    with torch.profiler.profile() as profile:
        work()
    return sum(event.count for event in profile.key_averages() if event.key == "c10d::_allgather_base_")


def initial_weights() -> dict[str, Tensor]:
    """Every logical tensor as it is before training."""
    return {part.name: local_block(p, part) for p, part in parameter_parts(build(PALI, seed=1))}


def weight_deviation(name: str, found: Tensor, expected: Tensor) -> float:
    """The distance of two tensors relative to the norm of one (or to 0.1, where a bias has hardly left zero).

    Keys' biases have no gradient but rounding (softmax ignores a shift), which optimizers turn into steps: of those
    only the size is compared.
    """
    if name.endswith("key.bias"):
        return 0.0 if float((found - expected).square().mean().sqrt()) <= 2 * KEY_BIAS else math.inf
    return float(torch.linalg.vector_norm(found - expected)) / max(float(torch.linalg.vector_norm(expected)), 0.1)


def global_batch(engine: Engine, step: int) -> list[MicroBatch]:
    """The batch of a step at the engine's resolution, for its towers, each micro-batch with a seed of its dropout."""
    config = engine.blueprint.config
    batches = tower_batches(step, config.tower, config.model.image_size)
    return [batch.seeded(step * MICRO_BATCHES + number) for number, batch in enumerate(batches)]


def share(engine: Engine, batches: list[MicroBatch]) -> list[MicroBatch]:
    """What this data-parallel rank takes of a global batch."""
    size = len(batches) // engine.layout.data_parallel_size
    first = engine.layout.data_parallel_rank * size
    return batches[first : first + size]


def train(
    engine: Engine, steps: range = range(STEPS), joined: bool = False, trimmed: bool = False
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    curve = []
    tokens = engine.blueprint.config.tokens_per_image
    for step in steps:
        batches = [batch.joined() if joined else batch for batch in global_batch(engine, step)]
        batches = [batch.trimmed(tokens) if trimmed else batch for batch in batches]
        images = engine.blueprint.config.tower == "vit"
        num_targets = sum(batch.num_examples if images else batch.num_targets for batch in batches)
        totals = engine.forward_backward(share(engine, batches), num_targets)
        curve.append((float(totals.loss), engine.update(LEARNING_RATES[type(engine.optimizer).__name__.lower()])))
    return curve


def validate(engine: Engine) -> Tensor:
    """Totals [4, objectives] of a step's batches that no training step had."""
    return stacked(engine.evaluate(share(engine, global_batch(engine, STEPS))))


def stacked(totals: LossTotals) -> Tensor:
    return torch.stack([totals.nll, totals.z_loss, totals.correct, totals.tokens])


def prompts(engine: Engine) -> list[MicroBatch]:
    """Micro-batches of prompts of three lengths, some with images and some without, one example a row."""
    batches = global_batch(engine, STEPS + 1)[:PROMPTS]
    return [replace(batch, encoder_segments=batch.encoder_segments.clamp(max=1)) for batch in batches]


def answers(engine: Engine, **search: Any) -> Tensor:
    """Tokens [data, 3, 6], greedy by default, of prompts that are others on each data-parallel rank.

    One process answers all.
    """
    rank, size = engine.layout.data_parallel_rank, engine.layout.data_parallel_size
    own = prompts(engine) if engine.layout.world_size == 1 else prompts(engine)[rank : rank + 1]
    found = [engine.generate(batch, 6, **search) for batch in own]
    found = [torch.nn.functional.pad(tokens, (0, 6 - tokens.shape[1])) for tokens in found]
    if size > 1:
        gathered = [torch.empty_like(found[0]) for _ in range(size)]
        dist.all_gather(gathered, found[0], group=engine.layout.data_group)
        found = gathered
    return torch.stack(found)


def given_scores(engine: Engine) -> Tensor:
    """Log-probabilities (nats) [3, 4] of given texts of four lengths after the first prompts."""
    texts = [[*range(5, 5 + length), 1] for length in (1, 4, 2, 7)]
    return engine.score(prompts(engine)[0], [texts, texts[::-1], texts])


def recognize(engine: Engine, answered: Tensor) -> Tensor:
    """Totals [4, objectives] of the first prompts with their own answers [3, 6] as targets, every third of them wrong.

    Of the first data-parallel rank; the others have a micro-batch without examples.
    """
    (rows, length), prompt = answered.shape, prompts(engine)[0]
    targets = answered.clone()
    targets[:, ::3] = (targets[:, ::3] + 1) % MT5.vocab_size
    batch = replace(
        prompt,
        decoder_tokens=torch.nn.functional.pad(answered[:, :-1], (1, 0)),
        decoder_targets=targets,
        decoder_segments=torch.ones(rows, length, dtype=torch.long),
        objectives=prompt.objectives[:, :length],
        target_positions=None,
    )
    return stacked(engine.evaluate([batch.emptied() if engine.layout.data_parallel_rank else batch]))


def weights(engine: Engine) -> dict[str, Tensor]:
    """Every logical weight, whole, fp32; gathered from all ranks (a collective): no rank, or stage, has them all."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for _, part in parameter_parts(engine.blueprint.plan):
        found[part.name] = torch.zeros(part.shape), torch.zeros(part.shape)
    for rectangle, values in engine.held_weights():
        where = tuple(slice(o, o + n) for o, n in zip(rectangle.offset, rectangle.size, strict=True))
        found[rectangle.name][0][where] += values.float().cpu()
        found[rectangle.name][1][where] += 1
    everything = torch.cat([x.flatten() for pair in found.values() for x in pair])
    dist.all_reduce(everything)
    pieces = iter(everything.split([total.numel() for total, _ in found.values() for _ in range(2)]))
    whole = {}
    for name, (total, _) in found.items():
        summed, count = next(pieces), next(pieces)
        assert bool((count > 0).all()), f"an element of {name} is on no rank"
        whole[name] = (summed / count).view_as(total)
    return whole


def golden_curve() -> dict[str, list[float]]:
    """Losses and gradient norms of one process, for `python -m tests.golden`."""
    case = Case()
    return as_lists(train(case.engine(case.layout())))


def as_lists(curve: list[tuple[float, float]]) -> dict[str, list[float]]:
    losses, norms = zip(*curve, strict=True)
    return {"steps": list(range(1, len(curve) + 1)), "loss": list(losses), "grad_norm": list(norms)}
