"""Sizes of the two towers and the choices that join them."""

from dataclasses import dataclass, field

from common.errors import ConfigurationError
from common.values import at_most

# Far beyond any model, and small enough that a model on `meta` is made, and counted, in seconds.
LAYERS, WIDEST, PIXELS = 1_000, 2**20, 2**14
ATTENTION = ("auto", "plain", "sdpa", "flex")
RESAMPLINGS = ("aligned_corners", "half_pixel")
HEADS = ("none", "map", "patches")  # of a ViT that is pretrained alone


@dataclass
class ViTConfig:
    """Size a vision transformer as in big_vision `models/vit.py` (`decode_variant`). The defaults are the toy's."""

    width: int = 128
    """Hidden size."""
    depth: int = 4
    """Number of blocks."""
    mlp_dim: int = 512
    """Inner size of the MLP."""
    num_heads: int = 4
    """Attention heads; they divide `width`."""
    patch_size: int = 14
    """Edge of a patch, in pixels. 14 in all of the paper's ViTs."""

    def __post_init__(self) -> None:
        _positive(
            "vit",
            width=self.width,
            depth=self.depth,
            mlp_dim=self.mlp_dim,
            num_heads=self.num_heads,
            patch_size=self.patch_size,
        )
        at_most("vit.", LAYERS, depth=self.depth)
        at_most("vit.", WIDEST, width=self.width, mlp_dim=self.mlp_dim, patch_size=self.patch_size)
        if self.width % self.num_heads:
            raise ConfigurationError(f"vit.width={self.width} must be a multiple of vit.num_heads={self.num_heads}.")

    def num_tokens(self, image_size: int) -> int:
        """Visual tokens of one square image of `image_size` pixels."""
        return (image_size // self.patch_size) ** 2


@dataclass
class MT5Config:
    """Size an mT5 (T5 1.1) encoder-decoder as T5X `examples/t5/mt5/*.gin`. The defaults are the toy's."""

    d_model: int = 128
    """Hidden size."""
    d_ff: int = 320
    """Inner size of the gated MLP."""
    d_kv: int = 32
    """Size of one attention head."""
    num_heads: int = 4
    """Attention heads."""
    num_encoder_layers: int = 3
    """Blocks of the encoder."""
    num_decoder_layers: int = 3
    """Blocks of the decoder."""
    vocab_size: int = 250112
    """Rows of the embedding and of the head. 250,112 in mT5: its tokenizer's 250,100 pieces, rounded up."""
    relative_attention_num_buckets: int = 32
    """Buckets of the relative position bias. mT5's default."""
    relative_attention_max_distance: int = 128
    """Positions beyond which all distances share a bucket. mT5's default."""
    bias_per_layer: bool = False
    """Give each block a relative-bias table of its own, as umT5 does. False by default: mT5 has one for a stack."""

    def __post_init__(self) -> None:
        _positive("mt5", **{name: value for name, value in vars(self).items() if name != "bias_per_layer"})
        at_most("mt5.", LAYERS, num_encoder_layers=self.num_encoder_layers, num_decoder_layers=self.num_decoder_layers)
        at_most("mt5.", WIDEST, d_model=self.d_model, d_ff=self.d_ff, d_kv=self.d_kv, num_heads=self.num_heads)
        at_most("mt5.", 2**24, vocab_size=self.vocab_size)

    @property
    def inner(self) -> int:
        """Width of all attention heads together; differs from `d_model` in mT5-small."""
        return self.num_heads * self.d_kv

    @property
    def bias_size(self) -> int:
        """Elements of one relative-bias table."""
        return self.relative_attention_num_buckets * self.num_heads


@dataclass
class ModelConfig:
    """Configure what joins the towers, and the loss."""

    image_size: int = 224
    """Edge of the square images, in pixels; a multiple of `vit.patch_size`. A phase usually has its own. 224 by
    default: the paper's first phase."""
    position_resampling: str = "aligned_corners"
    """How the ViT's position embeddings are resampled, bilinearly, to another number of patches. `aligned_corners`: the
    corners of the two grids are one point (big_vision, `scipy.ndimage.zoom`). `half_pixel`: the edges of their patches
    are one line (`jax.image.resize`). The default is big_vision's; the paper does not state PaLI's."""
    dropout_rate: float = 0.0
    """Dropout of mT5; the ViT has none. 0 by default, as in PaLI's pretraining."""
    attention: str = "auto"
    """Kernel of T5's attention: `plain` (any device; on a CPU example by example), `sdpa` (torch's
    scaled_dot_product_attention with a dense bias), `flex` (torch's flex_attention; needs CUDA to train) or `auto`
    (flex on CUDA, else plain). Auto by default: the fastest of the device."""
    z_loss: float = 1e-4
    """Factor on log(Z)^2 of every target token, which keeps logits small. T5X's default."""
    loss_reduction: str = "mean"
    """`mean` over the target tokens of the step, or `sum` (T5X `loss_normalizing_factor=None`). Mean by default, so
    that the gradient does not depend on the batch size."""
    loss_chunk: int = 1024
    """Target tokens whose logits exist at once. 1024 by default: 1 GB of fp32 logits at 250,112 pieces."""

    def __post_init__(self) -> None:
        _positive("model", image_size=self.image_size, loss_chunk=self.loss_chunk)
        at_most("model.", PIXELS, image_size=self.image_size)
        if self.attention not in ATTENTION:
            raise ConfigurationError(
                f"model.attention={self.attention!r} is unknown; choose {', '.join(ATTENTION[:-1])} or {ATTENTION[-1]}."
            )
        if self.position_resampling not in RESAMPLINGS:
            raise ConfigurationError(
                f"model.position_resampling={self.position_resampling!r} is unknown; choose {' or '.join(RESAMPLINGS)}."
            )
        if self.loss_reduction not in ("mean", "sum"):
            raise ConfigurationError(f"model.loss_reduction={self.loss_reduction!r} is unknown; choose mean or sum.")
        if not 0 <= self.dropout_rate < 1:
            raise ConfigurationError(f"model.dropout_rate={self.dropout_rate} must lie in [0, 1).")
        if self.z_loss < 0:
            raise ConfigurationError(f"model.z_loss={self.z_loss} must not be negative.")


@dataclass
class ClassifierConfig:
    """Configure the head of a ViT that is pretrained alone, as a classifier of images."""

    head: str = "none"
    """`map`, one attention pooling of all patches (big_vision's MAP head), or `patches`, one answer of each patch: the
    words and the box of the object in it. `none`, the default, is a model with an mT5."""
    num_classes: int = 0
    """Number of classes. 0 by default: `train.pretrain_vit` takes the number of lines of `data.tokenizer`."""
    bias: float = -10.0
    """First value of the biases of the classes. big_vision's `init_head_bias` by default: with thousands of classes
    nearly all answers are no."""

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise ConfigurationError(
                f"classifier.head={self.head!r} is unknown; choose {', '.join(HEADS[:-1])} or {HEADS[-1]}."
            )
        if self.num_classes < 0:
            raise ConfigurationError(f"classifier.num_classes={self.num_classes} must not be negative.")


@dataclass(frozen=True)
class PaLIConfig:
    """Bundle what the whole model is made of: two towers, and the choices that join them.

    `num_objectives`: training objectives whose losses the head reports one by one. `tower`: the only tower, while it
    is pretrained alone: `mt5` of text, or `vit` under a `classifier`; None: both.
    """

    vit: ViTConfig
    mt5: MT5Config
    model: ModelConfig
    num_objectives: int = 1
    tower: str | None = None
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)

    @property
    def tokens_per_image(self) -> int:
        """Visual tokens of one image."""
        return self.vit.num_tokens(self.model.image_size)


def _positive(group: str, **values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ConfigurationError(f"{group}.{name}={value} must be at least 1.")
