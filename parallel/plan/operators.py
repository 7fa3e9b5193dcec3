"""List the operators of each unit: matrix products, attention, elementwise traffic and vocabulary loss.

Sizes are those of whole sequences and whole matrices; `parallel/plan/unit_time.py` divides them over tensor-parallel
ranks. The FLOPs of a unit's operators are those of its `cost`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from model.classifier import MapHead, PatchHead
from model.costs import BatchShape, Unit, attention_flops, linear_flops
from model.mt5 import Block, Bridge, DecoderBlock, EncoderBlock, EncoderNorm, Head
from model.vit import Patches, ViTBlock, ViTNorm

BLOCK_LAUNCHES = 14  # kernels of a block beside products and attention: norms, activation, residuals, copies


@dataclass(frozen=True)
class Linear:
    """A linear map of `tokens` positions.

    `split`: "column" divides the outputs over the tensor-parallel ranks, "row" the inputs, "whole" nothing. "memory" is
    a "column" whose input is gathered already: once for the decoder blocks of a stage.
    """

    tokens: int
    d_in: int
    d_out: int
    split: str

    @property
    def flops(self) -> float:
        """Return the FLOPs of the forward pass on all tensor-parallel ranks."""
        return linear_flops(self.tokens, self.d_in, self.d_out)


@dataclass(frozen=True)
class Attention:
    """Attention of `rows` sequences; `fused` never writes the scores [heads, queries, keys] to memory."""

    rows: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    fused: bool

    @property
    def flops(self) -> float:
        """Return the FLOPs of the forward pass on all tensor-parallel ranks."""
        return attention_flops(self.rows, self.queries, self.keys, self.heads * self.head_dim)

    @property
    def io_elements(self) -> float:
        """Return the elements of query, key, value and result."""
        return 2.0 * self.rows * self.heads * self.head_dim * (self.queries + self.keys)

    @property
    def score_elements(self) -> float:
        """Return the elements of the scores."""
        return float(self.rows * self.heads * self.queries * self.keys)


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary loss of `tokens` targets, `chunk` at a time; its forward pass computes the gradients too."""

    tokens: int
    d_model: int
    size: int
    chunk: int


@dataclass(frozen=True)
class Operators:
    """The forward pass of one unit for one micro-batch.

    `stream_elements` are read or written in the residual stream, which sequence parallelism divides;
    `inner_elements` between column and row maps, which tensor parallelism always divides. `embedded_tokens` are
    looked up in a table of `embedded_width` that tensor-parallel ranks divide, then summed over them. `norm_elements`
    are those of the stream that the norms move, `mlp_elements` the inner ones that the MLP's activation moves.
    """

    linears: tuple[Linear, ...] = ()
    attentions: tuple[Attention, ...] = ()
    stream_elements: float = 0.0
    inner_elements: float = 0.0
    launches: int = 0
    vocabulary: Vocabulary | None = None
    embedded_tokens: int = 0
    embedded_width: int = 0
    norms: int = 0
    norm_elements: float = 0.0
    mlp_elements: float = 0.0
    scattered: tuple[float, ...] = ()
    gathered: tuple[float, ...] = ()

    @property
    def flops(self) -> float:
        """Return the FLOPs of the forward pass on all tensor-parallel ranks, as `Unit.cost` counts them."""
        head = self.vocabulary
        logits = linear_flops(head.tokens, head.d_model, head.size) if head else 0.0
        return sum(x.flops for x in self.linears) + sum(x.flops for x in self.attentions) + logits


def operators(unit: Unit, shape: BatchShape, fused: bool) -> Operators:
    """Return the operators of a unit; `fused`: T5's attention runs as one kernel (flex), as on a GPU."""
    made: Callable[[Any, BatchShape, bool], Operators] = _MAKE[type(unit)]
    return made(unit, shape, fused)


def _patches(unit: Patches, shape: BatchShape, _: bool) -> Operators:
    config, tokens = unit.config, shape.images * shape.vision_tokens
    pixels = config.patch_size**2 * 3
    moved = tokens * (6 * pixels + 6 * config.width)  # to the type, scale, shift, cut; position, transpose
    stream = (float(tokens * config.width),)
    return Operators((Linear(tokens, pixels, config.width, "whole"),), (), moved, 0.0, 8, scattered=stream)


def _vit_block(unit: ViTBlock, shape: BatchShape, _: bool) -> Operators:
    d, m, tokens = unit.config.width, unit.config.mlp_dim, shape.images * shape.vision_tokens
    heads, length = unit.config.num_heads, shape.vision_tokens
    linears = (
        Linear(tokens, d, 3 * d, "column"),
        Linear(tokens, d, d, "row"),
        Linear(tokens, d, m, "column"),
        Linear(tokens, m, d, "row"),
    )
    attention = Attention(shape.images, heads, length, length, d // heads, True)
    # Two norms (read, write) and two residuals (two reads, a write); biases and GELU, copies of q, k, v and the result.
    return Operators(
        linears, (attention,), tokens * 10.0 * d, tokens * (8.0 * d + 4.0 * m), BLOCK_LAUNCHES,
        norms=2, norm_elements=tokens * 4.0 * d, mlp_elements=tokens * 2.0 * m,
    )  # fmt: skip


def _bridge(unit: Bridge, shape: BatchShape, _: bool) -> Operators:
    d, words = unit.mt5.d_model, shape.rows * (shape.encoder_tokens + shape.decoder_tokens)
    rows = tuple(float(shape.rows * length * d) for length in (shape.encoder_tokens, shape.decoder_tokens))
    if unit.vit is None:
        return Operators((), (), words * 8.0 * d, 0.0, 8, embedded_tokens=words, embedded_width=d, scattered=rows)
    w, visual = unit.vit.width, shape.images * shape.vision_tokens
    moved = visual * (2.0 * w + 2.0 * d) + words * 8.0 * d  # norm, transpose; look up, split, place
    return Operators(
        (Linear(visual, w, d, "whole"),), (), moved, 0.0, 16, embedded_tokens=words, embedded_width=d, scattered=rows,
        gathered=(float(visual * d),),
    )  # fmt: skip


def _t5(block: Block, tokens: int) -> tuple[Linear, ...]:
    d, i, f = block.mt5.d_model, block.mt5.inner, block.mt5.d_ff
    return (
        Linear(tokens, d, 3 * i, "column"),
        Linear(tokens, i, d, "row"),
        Linear(tokens, d, 2 * f, "column"),
        Linear(tokens, f, d, "row"),
    )


def _encoder_block(unit: EncoderBlock, shape: BatchShape, fused: bool) -> Operators:
    d, i, f, length = unit.mt5.d_model, unit.mt5.inner, unit.mt5.d_ff, shape.encoder_tokens
    tokens = shape.rows * length
    attention = Attention(shape.rows, unit.mt5.num_heads, length, length, unit.mt5.d_kv, fused)
    # As the ViT's; GELU (read, write) and the product (two reads, a write) of the gated MLP.
    return Operators(
        _t5(unit, tokens), (attention,), tokens * 10.0 * d, tokens * (8.0 * i + 5.0 * f), BLOCK_LAUNCHES + 2,
        norms=2, norm_elements=tokens * 4.0 * d, mlp_elements=tokens * 3.0 * f,
    )  # fmt: skip


def _decoder_block(unit: DecoderBlock, shape: BatchShape, fused: bool) -> Operators:
    mt5, n, m = unit.mt5, shape.encoder_tokens, shape.decoder_tokens
    d, i, f, tokens = mt5.d_model, mt5.inner, mt5.d_ff, shape.rows * m
    cross = (
        Linear(tokens, d, i, "column"),
        Linear(shape.rows * n, d, 2 * i, "memory"),
        Linear(tokens, i, d, "row"),
    )
    attentions = tuple(Attention(shape.rows, mt5.num_heads, m, keys, mt5.d_kv, fused) for keys in (m, n))
    inner = tokens * (12.0 * i + 5.0 * f) + shape.rows * n * 4.0 * i
    return Operators(
        _t5(unit, tokens) + cross, attentions, tokens * 15.0 * d, inner, BLOCK_LAUNCHES + 8,
        norms=3, norm_elements=tokens * 6.0 * d, mlp_elements=tokens * 3.0 * f,
    )  # fmt: skip


def _encoder_norm(unit: EncoderNorm, shape: BatchShape, _: bool) -> Operators:
    return Operators(stream_elements=2.0 * shape.rows * shape.encoder_tokens * unit.mt5.d_model, launches=1)


def _head(unit: Head, shape: BatchShape, _: bool) -> Operators:
    tokens, d = shape.rows * shape.decoder_tokens, unit.mt5.d_model
    vocabulary = Vocabulary(tokens, d, unit.mt5.vocab_size, unit.model.loss_chunk)
    return Operators(stream_elements=4.0 * tokens * d, launches=4, vocabulary=vocabulary)


def _vit_norm(unit: ViTNorm, shape: BatchShape, _: bool) -> Operators:
    return Operators(stream_elements=2.0 * shape.images * shape.vision_tokens * unit.config.width, launches=1)


def _map_head(unit: MapHead, shape: BatchShape, _: bool) -> Operators:
    d, m, images, length = unit.vit.width, unit.vit.mlp_dim, shape.images, shape.vision_tokens
    linears = (
        Linear(images * length, d, 2 * d, "whole"),
        Linear(images, d, 2 * d + 2 * m, "whole"),
        Linear(images, d, unit.num_classes, "whole"),
    )
    attention = Attention(images, unit.vit.num_heads, 1, length, d // unit.vit.num_heads, True)
    return Operators(linears, (attention,), 8.0 * images * unit.num_classes, 0.0, BLOCK_LAUNCHES + 12)


def _patch_head(unit: PatchHead, shape: BatchShape, _: bool) -> Operators:
    tokens, outputs = shape.images * shape.vision_tokens, unit.boxes.out_features + unit.num_classes
    return Operators((Linear(tokens, unit.vit.width, outputs, "whole"),), (), 8.0 * tokens * outputs, 0.0, 40)


_MAKE: dict[type, Callable[..., Operators]] = {
    Patches: _patches,
    ViTBlock: _vit_block,
    Bridge: _bridge,
    EncoderBlock: _encoder_block,
    EncoderNorm: _encoder_norm,
    DecoderBlock: _decoder_block,
    Head: _head,
    ViTNorm: _vit_norm,
    MapHead: _map_head,
    PatchHead: _patch_head,
}
