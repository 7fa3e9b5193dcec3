"""Compute the bytes that a rank sends in a training step, by (group, kind) as `benchmarks.parallel.traffic` counts.

Groups: `data` (gradients and weights), `tensor` (the residual stream), `pipeline` (activations between stages and their
gradients), `stage` (all ranks of a pipeline stage: Adafactor's sums).
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from model.batch import MicroBatch
from model.config import MT5Config, ViTConfig
from model.costs import Unit
from model.layers import parameter_info
from model.mt5 import Bridge, DecoderBlock, EncoderBlock, EncoderNorm, Head
from model.vit import VIT_UNITS, Patches, ViTBlock
from parallel.engine.base import Engine
from parallel.engine.zero import ZeroEngine
from parallel.optimizer.adafactor import means
from parallel.pipeline.schedule import CarrySizes

Bytes = Counter[tuple[str, str]]
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Streams:
    """Bytes of a micro-batch's residual streams, as whole sequences.

    `placed` is the visual tokens after the projection to the encoder's width.
    """

    vision: int
    encoder: int
    decoder: int
    placed: int

    @classmethod
    def from_batch(cls, vit: ViTConfig, mt5: MT5Config, batch: MicroBatch) -> "Streams":
        """Compute the bytes of a micro-batch of these shapes."""
        visual_tokens = len(batch.images) * vit.num_tokens(batch.images.shape[1])
        positions = (visual_tokens, batch.encoder_tokens.numel(), batch.decoder_tokens.numel(), visual_tokens)
        widths = (vit.width, mt5.d_model, mt5.d_model, mt5.d_model)
        return cls(*(n * width * FLOAT for n, width in zip(positions, widths, strict=True)))


def expected_bytes(engine: Engine, vit: ViTConfig, mt5: MT5Config, batch: MicroBatch, micro_batches: int) -> Bytes:
    """Compute the bytes that this rank sends in a step of `micro_batches` (over all replicas) as large as `batch`.

    In fp32, with nothing recomputed or padded (lengths that sequence parallelism divides, as many micro-batches as
    interleaved stages take), nothing frozen but a ViT that each tensor-parallel rank holds whole, and ZeRO-3 gathering
    all of the model anew for every micro-batch.
    """
    own_micro_batches = micro_batches // engine.layout.data_parallel_size
    between = residuals(engine, Streams.from_batch(vit, mt5, batch), own_micro_batches)
    return (
        gradients(engine, own_micro_batches)
        + between
        + messages(engine, CarrySizes.from_batch(batch), own_micro_batches)
        + sums(engine)
    )


def gradients(engine: Engine, own_micro_batches: int) -> Bytes:
    """Compute the data-parallel group's bytes: gradients, and weights that other ranks updated.

    Gradients are summed once a step, or in every micro-batch (`reduce`). ZeRO-3 gathers weights once a step, or in
    every micro-batch (`gather`): once where the backward pass follows at once, which is so for the units of the last
    pipeline stage, else once more for the backward pass.
    """
    layout = engine.layout
    config, data = layout.config, layout.data_parallel_size
    ring = elements(p for p in engine.model.parameters() if p.requires_grad) * FLOAT * (data - 1) / data
    summed = ring / 2 if config.reduce_dtype == "bf16" else ring
    sent = Bytes()
    if config.zero_stage == 0:
        sent["data", "all-reduce"] = 2 * summed
        return +sent
    sent["data", "reduce-scatter"] = summed * (own_micro_batches if config.reduce == "micro_batch" else 1)
    sent["data", "all-gather"] = ring
    if config.zero_stage == 3 and config.gather == "micro_batch":
        last = (
            engine.blueprint.stages[-1].units
            if len(engine.blueprint.stages) - 1 in engine.blueprint.local_stages
            else []
        )
        kept = elements(p for name, unit in engine.model.units() if name in last for p in unit.parameters())
        again = ring - kept * FLOAT * (data - 1) / data
        sent["data", "all-gather"] = own_micro_batches * (ring + again)
    return +sent


def residuals(engine: Engine, streams: Streams, own_micro_batches: int) -> Bytes:
    """Compute the tensor-parallel group's bytes, forward and backward.

    They are `residual` of every unit, and gradients of weights that every rank holds whole.
    """
    layout = engine.layout
    tensor, sequence = layout.config.tensor, layout.config.sequence
    sent = Bytes()
    whole_vit = layout.config.replicate_frozen_vit
    between = [residual(unit, streams, sequence, whole_vit) for _, unit in engine.model.units()]
    stages = engine.pipeline.stages if engine.pipeline else [[name for name, _ in engine.model.units()]]
    numbers = engine.pipeline.local_stages if engine.pipeline else [0]
    decoding = [i for i in numbers if any(name.startswith("decoder_block") for name in stages[i])]
    between += len(decoding) * [encoder_output(streams, sequence)]
    for found in between:
        for kind, size in found.items():
            sent["tensor", kind] += size * own_micro_batches * (tensor - 1) / tensor
    sent["tensor", "all-reduce"] += 2 * FLOAT * joined(engine) * (tensor - 1) / tensor
    return +sent


def joined(engine: Engine) -> int:
    """Count the elements that tensor-parallel ranks hold whole, of this rank's shard under ZeRO.

    Their gradients are joined once a step.
    """
    if not isinstance(engine, ZeroEngine):
        whole = (p for p in engine.model.parameters() if p.requires_grad and not parameter_info(p).split)
        return elements(whole)
    placed = [each for bucket in engine.buckets for each in bucket.placed()]
    return sum(piece.size for p, piece in placed if not parameter_info(p).split)


def residual(unit: Unit, streams: Streams, sequence: bool, whole_vit: bool = False) -> Counter[str]:
    """Compute the bytes of the residual stream that a unit sums, gathers or scatters, by kind.

    An all-reduce sends twice its bytes.

    Plain: one all-reduce after and, in the backward pass, one before each attention and MLP. Under sequence
    parallelism, of each attention and MLP: the input is gathered twice and its gradient scattered, the output scattered
    and its gradient gathered. Besides: the embedding, the visual tokens, the head. A frozen ViT that each rank holds
    whole (`whole_vit`) sends nothing; its visual tokens are gathered after the projection.
    """
    if whole_vit and isinstance(unit, VIT_UNITS):
        return Counter()
    vision, encoder, decoder = streams.vision, streams.encoder, streams.decoder
    reduce, gather, scatter = {
        Patches: (0, vision, 0),
        ViTBlock: (4 * vision, 6 * vision, 4 * vision),
        Bridge: (encoder + decoder, encoder + decoder + streams.placed, 0),
        EncoderBlock: (4 * encoder, 6 * encoder, 4 * encoder),
        EncoderNorm: (0, 0, 0),
        DecoderBlock: (6 * decoder, 9 * decoder, 6 * decoder),
        Head: (decoder, decoder, decoder),
    }[type(unit)]
    if not sequence:
        gathered = streams.placed if whole_vit and isinstance(unit, Bridge) else 0
        return Counter({"all-reduce": 2 * reduce, "all-gather": gathered})
    summed = 2 * reduce if isinstance(unit, Bridge) else 0  # vocabulary-parallel look-ups, of whole sequences
    return Counter({"all-reduce": summed, "all-gather": gather, "reduce-scatter": scatter})


def encoder_output(streams: Streams, sequence: bool) -> Counter[str]:
    """Compute the bytes of the encoder's output, gathered for the decoder blocks of a stage, and of its gradient."""
    if not sequence:
        return Counter({"all-reduce": 2 * streams.encoder})
    return Counter({"all-gather": streams.encoder, "reduce-scatter": streams.encoder})


def messages(engine: Engine, sizes: CarrySizes, own_micro_batches: int) -> Bytes:
    """Compute the pipeline group's bytes: a stage's outputs, and the gradients of its inputs."""
    pipeline = engine.pipeline
    if pipeline is None:
        return Bytes()

    def after(stage: int) -> list[Tensor]:
        return pipeline.carry_plan.after(pipeline.stages[stage][-1], sizes, pipeline.dtype)

    last = len(pipeline.stages) - 1
    given = sum(x.nbytes for stage in pipeline.local_stages if stage < last for x in after(stage))
    taken = sum(x.nbytes for stage in pipeline.local_stages if stage for x in after(stage - 1) if x.requires_grad)
    return Bytes({("pipeline", "message"): (given + taken) * own_micro_batches})


def sums(engine: Engine) -> Bytes:
    """Compute the bytes of Adafactor's two all-reduces.

    They sum two numbers of every logical tensor that the stage updates and, of a factored one, its rows and columns:
    in the tensor-parallel group where ranks hold whole blocks, else over all ranks of the stage, which may be those of
    another group.
    """
    optimizer, config = engine.optimizer, engine.optimizer.config
    numbers = sum(2 + means(shape, config, optimizer.layouts.get(name)) for name, shape in optimizer.shapes.items())
    ranks = optimizer.group.size()
    layout = engine.layout
    groups = {"tensor": layout.tensor_group, "data": layout.data_group, "stage": layout.stage_group}
    group = next(name for name, each in groups.items() if each is optimizer.group)
    return +Bytes({(group, "all-reduce"): 2 * FLOAT * numbers * (ranks - 1) / ranks})


def elements(parameters: Iterable[Any]) -> int:
    """Count the elements of whole parameters, where ZeRO-3 left a shard too."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in parameters)
