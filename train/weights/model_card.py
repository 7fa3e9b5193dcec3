"""Write the model card of an export: what the model is, what went into it, and how to use it."""

from data.tokenizer import checksum
from parallel.checkpoint.stored_weights import StoredWeights
from train.config import RunConfig

_SCALED = """

`UMT5ForConditionalGeneration` of transformers 5 multiplies the logits of `text/` by `d_model`^-0.5, which neither \
training nor the whole model does: its most probable token is the same, its probabilities, beams and samples are not."""


def model_card(config: RunConfig, weights: StoredWeights, family: str) -> str:
    """Return the text of README.md; `config` is that of the checkpoint's phase, `family` that of the text part."""
    parameters = sum(tensor.shape.numel() for tensor in weights.tensors.values())
    size = config.model.image_size
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [pali]
---

# {config.run.name}, step {weights.step:,}

A PaLI model (Chen et al., 2022): a ViT of {config.vit.depth} blocks and width {config.vit.width}, and an mT5 of \
{config.mt5.num_encoder_layers} + {config.mt5.num_decoder_layers} layers and width {config.mt5.d_model}. It reads \
images of {size} x {size} pixels and a prompt, and writes a text. {parameters / 1e6:,.1f} M parameters.

## What went in

| | |
|---|---|
| run | `{config.run.name}`, step {weights.step:,} of {config.run.steps:,} |
| ViT, first weights | {_first(config.weights.vit, config)} |
| mT5, first weights | {_first(config.weights.mt5, config)} |
| tokenizer | `{config.data.tokenizer}`, SHA-256 `{checksum(config.data.tokenizer)}` |
| phases | {", ".join(f"`{name}`" for name in config.phases)} |
| precision | `{config.run.precision}` |

The phase of this step trained on these components, weighted:

| component | source | objective | weight |
|---|---|---|---:|
{_mixture(config)}

Licenses of the first weights and of the data apply to this model too; add `license:` above before you publish it.

## How to use it

```python
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

folder = "."  # this folder
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("Answer in EN: what is in the image? <extra_id_0>", return_tensors="pt")
answer = model.generate(**inputs, **processor(image, return_tensors="pt"))
print(tokenizer.decode(answer[0], skip_special_tokens=True))
```

`text/` is a folder of the text part's own class, `vision/` one of `SiglipVisionModel`. Prompts end in `<extra_id_0>`, \
as in training.{_SCALED if family == "umt5" else ""}
"""


def _first(file: str | None, config: RunConfig) -> str:
    if file is not None:
        return f"`{file}`"
    if config.run.initial is not None:
        return f"those of the run `{config.run.initial}`"
    return f"random (seed {config.run.seed})"


def _mixture(config: RunConfig) -> str:
    rows = (f"| {name} | {each.source} | {each.objective} | {each.weight:g} |" for name, each in config.mixture.items())
    return "\n".join(rows)
