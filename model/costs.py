"""What a unit costs: parameters, FLOPs, activation bytes. Each formula stands next to the unit it describes."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Shape:
    """The size of a batch: `images` x `vision_tokens` patch tokens, and `rows` of encoder and decoder tokens.

    One unpacked example of the paper: images=1, rows=1, encoder_tokens = visual + input text, decoder_tokens = target
    text.
    """

    images: int
    vision_tokens: int
    rows: int
    encoder_tokens: int
    decoder_tokens: int


@dataclass(frozen=True)
class Cost:
    """Of one unit: parameters (count), forward FLOPs (2 per multiply-add), bytes kept for its backward pass."""

    parameters: int = 0
    flops: float = 0.0
    activation_bytes: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)


def linear_flops(tokens: int, d_in: int, d_out: int) -> float:
    """A matrix product: 2 FLOPs per multiply-add."""
    return 2.0 * tokens * d_in * d_out


def attention_flops(rows: int, queries: int, keys: int, inner: int) -> float:
    """Scores and weighted sum, counted full (not causal): 4 Lq Lk inner per row."""
    return 4.0 * rows * queries * keys * inner


def training_flops(forward: float, trained: bool, below_trained: bool) -> float:
    """Forward and backward FLOPs of a unit.

    A trained unit pays the forward pass twice more (gradients of inputs and of weights); a frozen one above anything
    trained once more (gradients of inputs); a frozen one below everything trained nothing.
    """
    return forward * (3 if trained else 2 if below_trained else 1)
