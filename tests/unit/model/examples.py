"""Small models and packed batches for tests: what an example is, and rows made of examples."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.batch import MicroBatch
from model.config import ModelConfig, MT5Config, PaLIConfig, ViTConfig
from model.pali import PaLI, build

VIT = ViTConfig(width=24, depth=2, mlp_dim=40, num_heads=4, patch_size=4)
# d_kv * heads (48) differs from d_model (32), as in mT5-small; encoder and decoder differ in depth; 4 divides.
MT5 = MT5Config(d_model=32, d_ff=56, d_kv=12, num_heads=4, num_encoder_layers=3, num_decoder_layers=2, vocab_size=104)
MODEL = ModelConfig(image_size=16, z_loss=0.0, loss_chunk=7)
TOKENS_PER_IMAGE = VIT.num_tokens(MODEL.image_size)
NUM_OBJECTIVES = 3
PALI = PaLIConfig(VIT, MT5, MODEL, NUM_OBJECTIVES)


@dataclass
class Example:
    """Images (by seed), input and target token ids; the end-of-sequence id is added to the targets."""

    images: list[int] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    objective: int = 0

    def encoder_length(self, tokens_per_image: int) -> int:
        return len(self.images) * tokens_per_image + len(self.inputs)


def example(seed: int, images: int = 1, inputs: int = 5, targets: int = 4) -> Example:
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, MT5.vocab_size, (count,), generator=generator).tolist()

    return Example([100 * seed + i for i in range(images)], ids(inputs), ids(targets), seed % NUM_OBJECTIVES)


def image(seed: int, size: int = MODEL.image_size) -> Tensor:
    return torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def micro_batch(
    rows: list[list[Example]],
    encoder_length: int = 0,
    decoder_length: int = 0,
    image_slots: int = 0,
    image_size: int = MODEL.image_size,
) -> MicroBatch:
    """Each inner list packed into one row; lengths and image slots at least as given, and at least one image slot."""
    visual = VIT.num_tokens(image_size)
    encoder_length = max(encoder_length, *(sum(e.encoder_length(visual) for e in row) for row in rows), 1)
    decoder_length = max(decoder_length, *(sum(len(e.targets) + 1 for e in row) for row in rows), 1)
    images: list[Tensor] = []
    encoder = torch.zeros(3, len(rows), encoder_length, dtype=torch.long)
    decoder = torch.zeros(4, len(rows), decoder_length, dtype=torch.long)
    encoder[2] = -1
    for b, row in enumerate(rows):
        at, out = 0, 0
        for segment, e in enumerate(row, start=1):
            for seed in e.images:
                slot = len(images) * visual
                encoder[1, b, at : at + visual] = segment
                encoder[2, b, at : at + visual] = torch.arange(slot, slot + visual)
                images.append(image(seed, image_size))
                at += visual
            encoder[0, b, at : at + len(e.inputs)] = torch.tensor(e.inputs, dtype=torch.long)
            encoder[1, b, at : at + len(e.inputs)] = segment
            at += len(e.inputs)
            targets = [*e.targets, 1]
            here = slice(out, out + len(targets))
            decoder[0, b, here] = torch.tensor([0, *e.targets])
            decoder[1, b, here] = torch.tensor(targets)
            decoder[2, b, here] = segment
            decoder[3, b, here] = e.objective
            out += len(targets)
    blank = torch.zeros(image_size, image_size, 3, dtype=torch.uint8)
    images += [blank] * max(1 - len(images), image_slots - len(images), 0)
    return MicroBatch(torch.stack(images), *encoder, *decoder)


def small_model(seed: int = 0, model: ModelConfig = MODEL, vit: ViTConfig = VIT, mt5: MT5Config = MT5) -> PaLI:
    """Random initial values; biases and norms too, so that none of them can go unnoticed."""
    pali = build(PaLIConfig(vit, mt5, model, NUM_OBJECTIVES), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in pali.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return pali


def relative_error(ours: Tensor, theirs: Tensor, floor: float = 0.0) -> float:
    """|ours - theirs| / |theirs| in the Euclidean norm, with a floor under the denominator."""
    difference = (ours.double() - theirs.double()).norm().item()
    return difference / max(theirs.double().norm().item(), floor, 1e-300)


def largest_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error over tensors of the same names, and whose it is.

    The gradient of an attention's key bias is zero in exact arithmetic: it is measured by the query bias's.
    """
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()

    def floor(name: str) -> float:
        return (
            theirs[name.replace("key.bias", "query.bias")].double().norm().item() if name.endswith("key.bias") else 0.0
        )

    return max((relative_error(ours[name], theirs[name], floor(name)), name) for name in theirs)


def gradients(pali: PaLI) -> dict[str, Tensor]:
    from model.weights import logical_tensors

    return {name: x.clone() for name, x in logical_tensors(pali, lambda p: p.grad).items()}
