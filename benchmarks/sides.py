"""Build the two sides of a comparison: this system, and Hugging Face's MT5 + ViT connected the same way.

Both read rows of one image and text, and train all parameters (or all but the ViT) with Adafactor, in fp32 or in bf16
with fp32 weights. Each side is built in its own process.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from model.batch import MicroBatch
from model.config import PaLIConfig

LEARNING_RATE = 1e-3
NUM_OBJECTIVES = 8


@dataclass
class Example:
    """One image, uint8 [S, S, 3] (or None), and the ids of the input and of the target text."""

    image: Tensor | None
    inputs: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Setting:
    """Hold the model to compare; `frozen` are patterns of parameter names."""

    model: PaLIConfig
    frozen: Sequence[str] = ()


def ours(
    setting: Setting, precision: str, recompute: str = "none", zero_stage: int = 0
) -> Callable[[list[MicroBatch]], float]:
    """Build a step of this system's engine in one process; the step returns the loss, nats per target token."""
    from parallel.config import OptimizerConfig, ParallelConfig
    from parallel.distributed import launch
    from parallel.engine.build import build_engine
    from parallel.layout import Layout

    layout = Layout.start(ParallelConfig(recompute=recompute, zero_stage=zero_stage), launch())
    engine = build_engine(
        replace(setting.model, num_objectives=NUM_OBJECTIVES),
        OptimizerConfig(),
        layout,
        precision=precision,
        freeze=setting.frozen,
    )

    def step(batches: list[MicroBatch]) -> float:
        totals = engine.forward_backward(batches, sum(batch.num_targets for batch in batches))
        engine.update(LEARNING_RATE)
        return float(totals.loss)

    return step


class HuggingFace(nn.Module):
    """ViTModel -> linear -> MT5ForConditionalGeneration, visual tokens in front of the text's embeddings."""

    def __init__(self, setting: Setting) -> None:
        from transformers import MT5Config, MT5ForConditionalGeneration, ViTConfig, ViTModel

        super().__init__()
        vit, mt5 = setting.model.vit, setting.model.mt5
        self.vision = ViTModel(
            ViTConfig(
                hidden_size=vit.width,
                num_hidden_layers=vit.depth,
                num_attention_heads=vit.num_heads,
                intermediate_size=vit.mlp_dim,
                hidden_act="gelu_pytorch_tanh",
                image_size=setting.model.model.image_size,
                patch_size=vit.patch_size,
            ),
            add_pooling_layer=False,
        )
        self.projection = nn.Linear(vit.width, mt5.d_model)
        self.language = MT5ForConditionalGeneration(
            MT5Config(
                d_model=mt5.d_model,
                d_ff=mt5.d_ff,
                d_kv=mt5.d_kv,
                num_heads=mt5.num_heads,
                num_layers=mt5.num_encoder_layers,
                num_decoder_layers=mt5.num_decoder_layers,
                vocab_size=mt5.vocab_size,
                dropout_rate=0.0,
            )
        )
        # mT5 does not tie its output matrix to the embedding, but transformers 5 does.
        self.language.lm_head.weight = nn.Parameter(torch.randn_like(self.language.shared.weight) * mt5.d_model**-0.5)
        if setting.frozen:
            self.vision.requires_grad_(False)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """pixels fp32 [B, 3, S, S], tokens and mask int64 [B, L], labels int64 [B, M] -> mean loss."""
        visual = self.projection(self.vision(pixels).last_hidden_state[:, 1:])
        embeddings = torch.cat([visual, self.language.shared(tokens).to(visual.dtype)], dim=1)
        mask = torch.cat([mask.new_ones(visual.shape[:2]), mask], dim=1)
        return self.language(inputs_embeds=embeddings, attention_mask=mask, labels=labels).loss  # type: ignore[no-any-return]


def hugging_face(setting: Setting, precision: str) -> Callable[[list[dict[str, Tensor]]], float]:
    """Build a step like Trainer's with `bf16=True`: autocast over fp32 weights, transformers' Adafactor.

    Gradients of several batches are accumulated.
    """
    from transformers import Adafactor

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = HuggingFace(setting).to(device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = Adafactor(trained, lr=LEARNING_RATE, scale_parameter=True, relative_step=False, warmup_init=False)

    def precise() -> AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()

    def step(batches: list[dict[str, Tensor]]) -> float:
        total = 0.0
        for batch in batches:
            with precise():
                loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}) / len(batches)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def one_per_row(examples: list[Example], config: PaLIConfig, per_row: int = 1) -> MicroBatch:
    """Make our arrays with `per_row` examples, one by default, packed in each row, padded to the longest row."""
    visual, size = config.tokens_per_image, config.model.image_size
    rows = [examples[at : at + per_row] for at in range(0, len(examples), per_row)]
    length = max(sum(visual * (e.image is not None) + len(e.inputs) for e in row) for row in rows)
    targets = max(sum(len(e.targets) for e in row) for row in rows)
    encoder = torch.zeros(3, len(rows), length, dtype=torch.long)
    decoder = torch.zeros(4, len(rows), targets, dtype=torch.long)
    encoder[2] = -1
    images = torch.zeros(len(examples), size, size, 3, dtype=torch.uint8)
    for row, packed in enumerate(rows):
        at, out = 0, 0
        for segment, e in enumerate(packed, start=1):
            start = at
            if e.image is not None:
                slot = row * per_row + segment - 1
                images[slot], at = e.image, at + visual
                encoder[2, row, start:at] = slot * visual + torch.arange(visual)
            end, last = at + len(e.inputs), out + len(e.targets)
            encoder[0, row, at:end] = torch.tensor(e.inputs)
            encoder[1, row, start:end] = segment
            decoder[0, row, out + 1 : last] = torch.tensor(e.targets[:-1])
            decoder[1, row, out:last] = torch.tensor(e.targets)
            decoder[2, row, out:last] = segment
            at, out = end, last
    return MicroBatch(images, *encoder, *decoder)


def padded(examples: list[Example], image_size: int) -> dict[str, Tensor]:
    """Make Hugging Face's arrays of the same examples, with a blank image for a text without one."""
    blank = torch.full((image_size, image_size, 3), 127, dtype=torch.uint8)
    pixels = torch.stack([blank if e.image is None else e.image for e in examples])
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(e.inputs) for e in examples], batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(e.inputs), dtype=torch.long) for e in examples], batch_first=True)
    labels = [torch.tensor(e.targets) for e in examples]
    return {
        "pixels": pixels.permute(0, 3, 1, 2).float() / 127.5 - 1,
        "tokens": tokens,
        "mask": mask,
        "labels": nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
    }
