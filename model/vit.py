"""The vision transformer of big_vision `models/vit.py`, as units: patches and blocks; the bridge has its last norm."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, empty, float32, nn

from model.attention.kernels import split_heads, vit_attention
from model.batch import MicroBatch
from model.config import ModelConfig, ViTConfig
from model.costs import BatchShape, Cost, Unit, attention_flops, linear_flops
from model.initializers import fan_in_truncated, normal, xavier_uniform
from model.layers import ColumnLinear, Linear, RowLinear, describe_replicated
from model.norms import LayerNorm
from model.recompute import recomputed
from model.tensor_parallel import TensorParallel


class Patches(Unit):
    """Patch tokens of the images, with their positions."""

    def __init__(self, config: ViTConfig, model: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        self.config, self.parallel, self.tokens = config, parallel, config.num_tokens(model.image_size)
        self.inner = parallel.for_vit()
        pixels = config.patch_size**2 * 3
        self.embedding = Linear(pixels, config.width, weight_init=fan_in_truncated, partial_gradient=False)
        self.position = nn.Parameter(empty(self.tokens, config.width))
        resample = partial(resample_position, convention=model.position_resampling)
        describe_replicated(self.position, "position", normal(config.width**-0.5), resample=resample)

    def forward(self, carry: tuple[Tensor, ...], batch: MicroBatch) -> tuple[Tensor, ...]:
        """() -> (vision,): [N, I, width] of N patch tokens per image and I image slots.

        Under sequence parallelism zeros follow the tokens, up to a multiple of the ranks, and each rank has its share
        of N. No token attends to the zeros, and the bridge drops them. Where every rank holds the ViT whole, it has its
        share of I instead.
        """
        weight = self.embedding.weight
        images = self.parallel.share_images(batch.images)
        pixels = images.to(weight.dtype) / 127.5 - 1.0  # [0, 255] -> [-1, 1]
        vision = self.embedding(patchify(pixels, self.config.patch_size)) + self.position
        # Contiguous, or every block would keep the transposed order and copy before each matrix product.
        vision = vision.transpose(0, 1).contiguous()
        if padding := self.inner.padding(self.tokens):
            vision = F.pad(vision, (0, 0, 0, 0, 0, padding))
        return (self.inner.scatter(vision),)

    def cost(self, shape: BatchShape) -> Cost:
        """See Unit.cost. Kept: the pixels of the patches."""
        d, tokens = self.config.width, shape.images * shape.vision_tokens
        pixels = self.config.patch_size**2 * 3
        kept = shape.element_bytes * tokens * pixels
        return Cost(pixels * d + d + shape.vision_tokens * d, linear_flops(tokens, pixels, d), kept)


class ViTBlock(Unit):
    """Pre-norm self-attention and MLP with tanh-GELU, biases everywhere."""

    def __init__(self, config: ViTConfig, image_size: int, parallel: TensorParallel) -> None:
        super().__init__()
        d = config.width
        self.config, self.tokens = config, config.num_tokens(image_size)
        self.attention_norm = LayerNorm(d, partial_gradient=parallel.sequence)
        self.attention_in = ColumnLinear(
            d, {"query": d, "key": d, "value": d}, parallel, bias=True, weight_init=xavier_uniform
        )
        self.attention_out = RowLinear(d, d, "out", parallel, bias=True, weight_init=xavier_uniform)
        self.mlp_norm = LayerNorm(d, partial_gradient=parallel.sequence)
        self.mlp_in = ColumnLinear(
            d, {"hidden": config.mlp_dim}, parallel, bias=True, weight_init=xavier_uniform, bias_init=normal(1e-6)
        )
        self.mlp_out = RowLinear(
            config.mlp_dim, d, "out", parallel, bias=True, weight_init=xavier_uniform, bias_init=normal(1e-6)
        )

    def forward(self, carry: tuple[Tensor, ...], batch: MicroBatch) -> tuple[Tensor, ...]:
        """(vision,) -> (vision,): [N, I, width], or [N / tensor, I, width] under sequence parallelism."""
        (vision,) = carry
        head_dim = self.config.width // self.config.num_heads
        projected = self.after_norm(self.attention_norm, vision, self.attention_in)
        query, key, value = (split_heads(x, head_dim) for x in projected)
        key, value = key[: self.tokens], value[: self.tokens]  # not the padding
        vision = vision + self.attention_out(vit_attention(query, key, value))
        (hidden,) = self.after_norm(self.mlp_norm, vision, self.mlp_in)
        return (vision + self.mlp(hidden),)

    def mlp(self, hidden: Tensor) -> Tensor:
        """[N, I, mlp_dim / tensor] before the activation -> [N, I, width]."""
        active = F.gelu(hidden, approximate="tanh")
        if not self.recomputes("mlp"):
            return self.mlp_out(active)  # type: ignore[no-any-return]
        inputs = hidden.detach()
        with recomputed(active, lambda: F.gelu(inputs, approximate="tanh"), self.mlp_out):
            return self.mlp_out(active)  # type: ignore[no-any-return]

    def cost(self, shape: BatchShape) -> Cost:
        """See Unit.cost. Kept: two norms' inputs and outputs, q k v, attended, MLP before and after GELU."""
        d, m, tokens = self.config.width, self.config.mlp_dim, shape.images * shape.vision_tokens
        flops = linear_flops(tokens, d, 4 * d + 2 * m) + attention_flops(
            shape.images, shape.vision_tokens, shape.vision_tokens, d
        )
        element = shape.element_bytes * tokens
        return Cost(
            4 * d * d + 2 * d * m + 9 * d + m,
            flops,
            element * (8 * d + 2 * m),
            element * d,
            mlp_bytes=element * m,
            norm_bytes=element * 2 * d,
        )


class ViTNorm(Unit):
    """The last norm of a ViT that is pretrained alone, as its bridge: PaLI's bridge has it under the same name."""

    def __init__(self, config: ViTConfig, parallel: TensorParallel) -> None:
        super().__init__()
        self.config = config
        self.vit_norm = LayerNorm(config.width, partial_gradient=parallel.sequence)

    def forward(self, carry: tuple[Tensor, ...], batch: MicroBatch) -> tuple[Tensor, ...]:
        """(vision,) -> (vision,): [N, I, width]."""
        return (self.vit_norm(carry[0]),)

    def cost(self, shape: BatchShape) -> Cost:
        """See Unit.cost. Kept: the norm's input."""
        d = self.config.width
        return Cost(2 * d, 0.0, shape.element_bytes * shape.images * shape.vision_tokens * d)


VIT_UNITS = (Patches, ViTBlock)  # the units that `TensorParallel.whole_vit` keeps whole


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images [I, S, S, 3] into patches [I, (S / patch)^2, patch * patch * 3], row by row.

    Pixels beyond a multiple of the patch size are dropped.
    """
    rows = images.shape[1] // patch_size
    images = images[:, : rows * patch_size, : rows * patch_size]
    return (
        images.unflatten(2, (rows, patch_size))
        .unflatten(1, (rows, patch_size))
        .permute(0, 1, 3, 2, 4, 5)
        .flatten(3)
        .flatten(1, 2)
    )


def resample_position(position: Tensor, num_tokens: int, convention: str = "aligned_corners") -> Tensor:
    """Resample a learned position embedding [N, width] bilinearly to another square grid.

    `aligned_corners`: corners map to corners, as `scipy.ndimage.zoom(order=1)` does in big_vision `resample_posemb`.
    `half_pixel`: edges map to edges, as `jax.image.resize` does, which averages over the old grid where the new one is
    coarser.
    """
    if position.shape[0] == num_tokens:
        return position
    old, new = round(position.shape[0] ** 0.5), round(num_tokens**0.5)
    grid = position.to(float32).reshape(1, old, old, -1).permute(0, 3, 1, 2)
    corners = convention == "aligned_corners"
    grid = F.interpolate(grid, size=(new, new), mode="bilinear", align_corners=corners, antialias=not corners)
    return grid.permute(0, 2, 3, 1).reshape(num_tokens, -1).to(position.dtype)
