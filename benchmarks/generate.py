"""Time generation beside Hugging Face's `generate` (SDPA) on the same weights, and compare the tokens.

    python -m benchmarks.generate                              # ViT-B + mT5-small, 4 images with prompts
    python -m benchmarks.generate vit=mini mt5=mini repeats=3
    python -m benchmarks.generate clock=cpu                    # processor time, on a machine with other work

Hugging Face's side is the class of an exported folder (`modeling_pali.py`), so both read the same files. Each side runs
in its own process, and they take turns. The weights are random: the model has learned nothing, and ends rarely, so both
sides generate as many tokens as they may. The last line scores class names after one image: Hugging Face's forward pass
takes the names as a batch, with the encoder's output of the image expanded to it.
"""

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.sides import Example, one_per_row, padded
from benchmarks.step import alternate, examples
from benchmarks.worker import Worker
from common.command_line import parse, run_command
from common.values import one_of
from model.config import PaLIConfig
from model.describe import read_model
from model.generation import generate, score
from model.pali import PaLI, build, units
from model.weights import load, logical_tensors
from model.weights.export_folder import open_export, write_weights
from model.weights.stored import StoredTensor, Values

NAMES_AT_ONCE = 128  # class names of a forward pass of Hugging Face's: more need more memory for logits


@dataclass
class Options:
    """Time generation beside Hugging Face's `generate` (SDPA) on the same weights, and compare the tokens."""

    vit: str = "base"
    """A file of conf/vit."""
    mt5: str = "small"
    """A file of conf/mt5."""
    image_size: int = 224
    """Height and width of images, in pixels."""
    batch: int = 4
    """Images with prompts that are answered at once; every second prompt is half as long."""
    input_tokens: int = 16
    """Tokens of the longer prompts."""
    max_new_tokens: int = 32
    """Tokens of an answer."""
    num_beams: list[int] = field(default_factory=lambda: [1, 4])
    """Beams of each line; 1 is greedy."""
    names: int = 64
    """Class names, of 1 to 8 tokens, that are scored after one image; 0 leaves the line out."""
    repeats: int = 5
    """Timed runs of each side, after a warm-up; the table shows the median."""
    clock: str = "wall"
    """`wall`: seconds that pass. `cpu`: seconds of processor time of a side, which other work changes little."""

    def __post_init__(self) -> None:
        """Raise ConfigurationError for an unknown clock."""
        one_of("clock", self.clock, ("wall", "cpu"))


def prompts(config: PaLIConfig, options: Options) -> list[Example]:
    """Make random images and prompts of two lengths."""
    made = examples(config, options.batch, options.input_tokens, 1)
    for each in made[1::2]:
        each.inputs = each.inputs[: len(each.inputs) // 2]
    return made


def class_names(config: PaLIConfig, count: int) -> list[list[int]]:
    """Make random ids of 1 to 8 tokens, with EOS."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    return [[*torch.randint(3, config.mt5.vocab_size, (n,), generator=generator).tolist(), 1] for n in lengths]


def make_ours(folder: str, config: PaLIConfig, options: Options, beams: int) -> Callable[[], float]:
    """Make this system's side; its step writes the tokens or scores to the folder."""
    model = PaLI(units(config))
    load(model, Values(open_export(Path(folder))[1]))
    made = prompts(config, options)
    search = {"num_beams": beams, "length_penalty": 1.0, "length_norm": "hugging_face"}
    if beams:
        batch = one_per_row(made, config)
        return lambda: _keep(folder, "ours", generate(model, batch, options.max_new_tokens, **search))
    batch, names = one_per_row(made[:1], config), class_names(config, options.names)
    return lambda: _keep(folder, "ours", score(model, batch, [names])[0])


def make_hugging_face(folder: str, config: PaLIConfig, options: Options, beams: int) -> Callable[[], float]:
    """Make Hugging Face's side: `generate`, or a forward pass of the decoder for each batch of class names."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, attn_implementation="sdpa")
    arrays = padded(prompts(config, options)[: None if beams else 1], config.model.image_size)
    inputs = {"pixel_values": arrays["pixels"], "input_ids": arrays["tokens"], "attention_mask": arrays["mask"]}
    model.eval()
    settings = {"max_new_tokens": options.max_new_tokens, "num_beams": beams, "length_penalty": 1.0, "do_sample": False}
    if beams:
        return lambda: _keep(folder, "theirs", model.generate(**inputs, **settings)[:, 1:])
    return lambda: _keep(folder, "theirs", _scores(model, inputs, class_names(config, options.names)))


@torch.no_grad()
def _scores(model: Any, inputs: Mapping[str, Tensor], names: Sequence[Sequence[int]]) -> Tensor:
    encoded = model.get_encoder()(**inputs)[0]
    found = []
    for start in range(0, len(names), NAMES_AT_ONCE):
        labels = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(name) for name in names[start : start + NAMES_AT_ONCE]], batch_first=True, padding_value=-100
        )
        mask = inputs["attention_mask"].expand(len(labels), -1)
        logits = model(
            encoder_outputs=(encoded.expand(len(labels), -1, -1),),
            attention_mask=mask,
            decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels),
        ).logits
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none")
        found.append(-nll.sum(1))
    return torch.cat(found)


def _keep(folder: str, side: str, found: Tensor) -> float:
    """Write a side's tokens or scores for the comparison."""
    torch.save(found, Path(folder, f"{side}.pt"))
    return 0.0


def same(folder: str) -> str:
    """Compare what both sides wrote: tokens up to EOS, or the largest relative difference of scores."""
    ours, theirs = (torch.load(Path(folder, f"{side}.pt")) for side in ("ours", "theirs"))
    if ours.is_floating_point():
        return f"{((ours - theirs) / theirs).abs().max().item():.0e}"
    ended = (theirs == 1).cumsum(1) - (theirs == 1).long() > 0
    theirs = theirs.masked_fill(ended, 0)  # transformers pads beams with EOS
    return "same" if ours.shape == theirs.shape and torch.equal(ours, theirs) else "different"


def export_random(folder: Path, config: PaLIConfig) -> None:
    """Write a model of random weights as an export."""
    tensors = logical_tensors(build(config))
    stored = {name: StoredTensor(x.shape, x.dtype, lambda x=x: x) for name, x in tensors.items()}  # type: ignore[misc]
    write_weights(folder, config, "mt5", stored, 2 * 10**9)


def main(options: Options) -> None:
    """Print the table."""
    console = Console(width=120)
    config, _ = read_model([f"vit={options.vit}", f"mt5={options.mt5}"])
    config.model.image_size = options.image_size
    table = Table(
        title=f"ViT {options.vit} + mT5 {options.mt5}, fp32, {options.batch} images, {options.max_new_tokens} tokens, "
        f"{torch.get_num_threads()} threads, {options.clock} seconds, median of {options.repeats}"
    )
    for name in ("task", "ours", "Hugging Face", "HF / ours", "of the runs", "tokens or scores"):
        table.add_column(name, justify="left" if name == "task" else "right", no_wrap=True)
    with tempfile.TemporaryDirectory() as folder:
        export_random(Path(folder), config)
        for beams in [*options.num_beams, *([0] if options.names else [])]:
            cpu = options.clock == "cpu"
            sides = [Worker(make, folder, config, options, beams, cpu=cpu) for make in (make_ours, make_hugging_face)]
            seconds = alternate(sides, options.repeats, warm_up=1)
            for side in sides:
                side.close()
            ratios = sorted(theirs / mine for mine, theirs in zip(*seconds, strict=True))
            task = {0: f"score {options.names} names", 1: "greedy"}.get(beams, f"{beams} beams")
            row = [
                task,
                *(f"{statistics.median(taken):.2f} s" for taken in seconds),
                f"{statistics.median(ratios):.2f}",
                f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
                same(folder),
            ]
            console.print("  ".join(row))  # at once, because each row takes minutes
            table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    run_command(lambda words: main(parse(words, Options)))
