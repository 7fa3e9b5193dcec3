"""Answer on one GPU, within ten minutes, whether this system is right there, how fast it is, and where time goes.

    python -m benchmarks.gpu                                  # writes gpu.json and gpu.md
    python -m benchmarks.gpu minutes=3 sections=[kernels]
    python -m benchmarks.gpu small=true                       # the whole path with a toy, also on a CPU

Sections, by worth: `correctness` (kernels against the plain one in fp64, engines under every ZeRO stage), `kernels`
(each kernel of T5's attention timed), `steps` (whole models and blocks of pali_17b; Hugging Face's MT5 + ViT beside).
A measurement that fails has its cause in the table.
"""

import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.gpu import engines, kernels
from benchmarks.gpu.jobs import Clock, run_job
from benchmarks.gpu.report import as_markdown
from benchmarks.gpu.steps import Step, time_hugging_face, time_ours
from benchmarks.sides import Setting
from common.command_line import parse, run_command
from common.errors import ConfigurationError, RunStopped
from common.files import write_text
from common.values import above, at_least, one_of
from model.attention.kernels import KERNELS
from model.config import PaLIConfig
from model.describe import read_model

SECTIONS = ("correctness", "kernels", "steps")
BLOCKS = 2  # of each kind of pali_17b: the whole model is too large for one GPU
LENGTHS = ((288, 32, 16), (1152, 128, 8), (2048, 256, 4))  # encoder, decoder positions and rows
JOB_S = 150.0  # most seconds of one measurement


@dataclass
class Options:
    """Measure on one GPU whether this system is right there, how fast it is, and where time goes."""

    sections: list[str] = field(default_factory=lambda: list(SECTIONS))
    """Sections to run, of correctness, kernels and steps; all by default."""
    minutes: float = 10.0
    """Minutes of the whole run; what is left then is marked as not run."""
    small: bool = False
    """Run the same path with a toy, on a GPU or a CPU. False by default: a GPU is needed."""
    examples: int = 64
    """Examples of a step; halved where memory runs out."""
    per_row: int = 4
    """Examples packed in a row of ours. 4 by default: rows are then nearly full."""
    input_tokens: int = 32
    """Mean tokens of text that an example adds to the encoder."""
    target_tokens: int = 32
    """Mean tokens of an example's target."""
    repeats: int = 10
    """Timed steps or passes; the tables show the median."""
    separate: bool = True
    """Give each measurement a process of its own. True by default: one that runs out of memory ends alone."""
    output: str = "gpu"
    """Files that are written: `<output>.json` and `<output>.md`."""

    def __post_init__(self) -> None:
        for section in self.sections:
            one_of("sections", section, SECTIONS)
        at_least("", 1, examples=self.examples, per_row=self.per_row, repeats=self.repeats)
        above("", 0, minutes=self.minutes)


def settings(small: bool) -> dict[str, tuple[Setting, str]]:
    """Return the models to time by name, with what is recomputed; the most useful first."""
    if small:
        toy = read_model(["model=pali_mini", "vit=micro", "mt5=micro"])[0]
        toy = replace(toy, model=replace(toy.model, image_size=28), mt5=replace(toy.mt5, vocab_size=512))
        return {"toy": (Setting(toy), "none"), "toy, elementwise recomputed": (Setting(toy), "elementwise")}
    found = {name: read_model([f"model={name}", "phases=frozen_224"]) for name in ("pali_3b", "pali_1_5b", "pali_700m")}
    wide, frozen = read_model(["model=pali_17b", "phases=frozen_224"])
    blocks = replace(
        wide,
        vit=replace(wide.vit, depth=BLOCKS),
        mt5=replace(wide.mt5, num_encoder_layers=BLOCKS, num_decoder_layers=BLOCKS, vocab_size=8192),
    )
    large = read_model(["model=pali_3b", "phases=full_588"])
    return {
        "pali_3b, ViT frozen, 224 px": (Setting(*found["pali_3b"]), "none"),
        f"pali_17b, {BLOCKS} blocks of each kind, ViT frozen, 224 px": (Setting(blocks, frozen), "none"),
        f"pali_17b, {BLOCKS} blocks of each kind, all trained, 224 px": (Setting(blocks), "none"),
        "pali_1_5b, ViT frozen, 224 px": (Setting(*found["pali_1_5b"]), "none"),
        "pali_700m, ViT frozen, 224 px": (Setting(*found["pali_700m"]), "none"),
        "pali_3b, all trained, 588 px": (Setting(*large), "elementwise"),
    }


Job = tuple[str, str, Callable[..., dict[str, Any]], tuple[Any, ...]]  # section, name, function, arguments


def jobs(options: Options) -> Iterator[Job]:
    """Yield all measurements, the most useful of each section first."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    toy = next(iter(settings(True).values()))[0].model
    mt5 = toy.mt5 if options.small else read_model(["model=pali_17b", "phases=frozen_224"])[0].mt5
    lengths = ((64, 16, 2),) if options.small else LENGTHS
    decoder, encoder = (16, 64) if options.small else (128, 1152)
    yield "correctness", "kernels", kernels.compare, (_narrow(toy).mt5, device, 2, encoder, decoder)
    yield "correctness", "engines", engines.compare, (toy, device)
    for kernel in KERNELS:
        yield "kernels", kernel, kernels.measure, (mt5, device, kernel, lengths, options.repeats)
    for name, (setting, recompute) in settings(options.small).items():
        step = Step(setting, options.examples, options.per_row, options.input_tokens, options.target_tokens,
                    options.repeats)  # fmt: skip
        yield "steps", f"{name}, ours", time_ours, (step, recompute)
        if recompute == "none":
            yield "steps", f"{name}, Hugging Face", time_hugging_face, (step,)


def _narrow(model: PaLIConfig) -> PaLIConfig:
    """Return the model with heads as wide as every mT5's, but few."""
    return replace(model, mt5=replace(model.mt5, d_kv=64, num_heads=4))


def main(options: Options) -> None:
    """Run the sections and write both files; raise ConfigurationError without a GPU, RunStopped for wrong results."""
    if not options.small and not torch.cuda.is_available():
        raise ConfigurationError("benchmarks.gpu needs a GPU and torch finds none; set small=true for a toy on a CPU.")
    clock, console = Clock(options.minutes), Console(width=150)
    found: dict[str, Any] = {"machine": machine(), "options": vars(options)}
    for section, name, function, arguments in jobs(options):
        if section not in options.sections:
            continue
        limit_s = min(JOB_S, clock.left_s)
        result = run_job(function, arguments, limit_s) if options.separate else function(*arguments)
        found.setdefault(section, {})[name] = result
        console.print(f"{section}: {name}: {result.get('failed', 'done')} ({result.get('took_s', 0)} s)")
        write_text(Path(f"{options.output}.json"), json.dumps(found, indent=1))  # a run that is cut short leaves it
    text = as_markdown(found)
    write_text(Path(f"{options.output}.md"), text)
    console.print(text)
    wrong = [name for name, result in found.get("correctness", {}).items() if not result.get("ok")]
    if wrong:
        raise RunStopped(f"Results are wrong or missing: {', '.join(wrong)}; see {options.output}.json.")


def machine() -> dict[str, Any]:
    """Return what was measured on."""
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if on_gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "python": sys.version.split()[0],
        "host": platform.platform(),
    }


if __name__ == "__main__":
    run_command(lambda words: main(parse(words, Options)))
