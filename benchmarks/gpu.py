"""Measure on one GPU: bf16 steps beside Hugging Face's, and flex attention beside the plain one.

    python -m benchmarks.gpu                           # everything: pali_3b frozen at 224 px, blocks of pali_17b
    python -m benchmarks.gpu sections=[steps] batch=32 repeats=20
    python -m benchmarks.gpu sections=[attention]

TFLOP/s are the model's own (`model/costs.py`: backward only for what is trained, no recomputation, no padding); MFU
divides them by the vendor's dense bf16 peak. The sides run one after the other, each in its own process.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.sides import Setting
from benchmarks.step import make_hugging_face, make_ours
from benchmarks.worker import Worker
from common.command_line import parse, run_command
from common.errors import ConfigurationError
from common.values import one_of
from model.attention.bias import bias_by_distance
from model.attention.kernels import KERNELS
from model.attention.masks import Mask
from model.config import MT5Config
from model.costs import batch_flops
from model.describe import one_example, read_model
from model.pali import plan_on_meta
from train.step.flops import PEAK_TFLOPS

SECTIONS = ("steps", "attention")
BLOCKS = 2  # of each kind of pali_17b: the whole model is too large for one GPU
LENGTHS = ((288, 32, 16), (1024, 128, 8), (2048, 256, 4))  # encoder, decoder positions and rows


@dataclass
class Options:
    """Measure on one GPU: bf16 steps beside Hugging Face's, and flex attention beside the plain one."""

    sections: list[str] = field(default_factory=lambda: list(SECTIONS))
    """Sections to run, of steps and attention."""
    batch: int = 16
    """Examples of a step, one per row."""
    input_tokens: int = 32
    """Tokens of text that each example adds to the encoder."""
    target_tokens: int = 32
    """Tokens of each example's target."""
    repeats: int = 10
    """Timed steps or passes, after three that compile; the table shows the median."""

    def __post_init__(self) -> None:
        """Raise ConfigurationError for an unknown section."""
        for section in self.sections:
            one_of("sections", section, SECTIONS)


def models() -> dict[str, Setting]:
    """Return the models to time: one whole model of the paper, and a few blocks as wide as its largest."""
    whole = Setting(*read_model(["model=pali_3b", "phases=frozen_224"]))
    wide, frozen = read_model(["model=pali_17b", "phases=frozen_224"])
    blocks = replace(
        wide,
        vit=replace(wide.vit, depth=BLOCKS),
        mt5=replace(wide.mt5, num_encoder_layers=BLOCKS, num_decoder_layers=BLOCKS, vocab_size=8192),
    )
    few = Setting(blocks, frozen)
    return {
        "pali_3b, ViT frozen, 224 px": whole,
        f"pali_17b, {BLOCKS} blocks of each kind, ViT frozen": few,
        f"pali_17b, {BLOCKS} blocks of each kind, all trained": replace(few, frozen=[]),
    }


def peak_of_this_gpu() -> float | None:
    """Return the dense bf16 TFLOP/s of the vendor's data sheet, or None where the device is not listed."""
    name = torch.cuda.get_device_name()
    return next((bf16 for known, (bf16, _) in PEAK_TFLOPS.items() if known in name), None)


def steps(console: Console, shape: tuple[int, int, int], repeats: int) -> None:
    """Print time, TFLOP/s, MFU and memory of a step of both sides."""
    peak = peak_of_this_gpu()
    table = Table(title=f"one bf16 step: batch {shape[0]}, text {shape[1]}/{shape[2]} tokens, median of {repeats}")
    for name in ("model", "side", "step", "examples/s", "TFLOP/s", "MFU", "peak memory"):
        table.add_column(name, justify="left" if name in ("model", "side") else "right", no_wrap=True)
    for name, setting in models().items():
        plan = plan_on_meta(setting.model, setting.frozen)
        tflop = shape[0] * batch_flops(plan.units(), one_example(setting.model, *shape[1:])) / 1e12
        sides: dict[str, Callable[..., Callable[[], float]]] = {"ours": make_ours, "Hugging Face": make_hugging_face}
        for side, make in sides.items():
            try:
                seconds, memory = timed(make, setting, shape, repeats)
            except EOFError:  # the process ended, most likely out of memory; its own message has the cause
                table.add_row(name, side, "failed", *["-"] * 4)
                continue
            table.add_row(
                name,
                side,
                f"{seconds * 1e3:.0f} ms",
                f"{shape[0] / seconds:.1f}",
                f"{tflop / seconds:.1f}",
                f"{tflop / seconds / peak:.1%}" if peak else "unknown peak",
                f"{memory / 2**30:.1f} GiB",
            )
    console.print(table)


def timed(
    make: Callable[..., Callable[[], float]], setting: Setting, shape: tuple[int, int, int], repeats: int
) -> tuple[float, int]:
    """Return (median seconds of a step, peak bytes on the GPU), without the first steps, which compile."""
    worker = Worker(make, setting, "bf16", *shape)
    for _ in range(3):
        worker.step()
    seconds = statistics.median(worker.step() for _ in range(repeats))
    return seconds, worker.close()


def attention(console: Console, repeats: int) -> None:
    """Print time and memory of mT5-XXL's self-attention, forward and backward, in packed rows of two examples."""
    mt5 = read_model(["model=pali_17b", "phases=frozen_224"])[0].mt5
    table = Table(
        title=f"T5 attention, {mt5.num_heads} heads of {mt5.d_kv}, bf16, forward and backward, median of {repeats}"
    )
    for name in ("positions", "rows", "kind", "plain", "flex", "plain / flex", "plain memory", "flex memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for encoder, decoder, rows in LENGTHS:
        for kind, length in (("encoder", encoder), ("decoder", decoder)):
            found = {name: time_pass(name, mt5, rows, length, kind == "decoder", repeats) for name in ("plain", "flex")}
            (plain_s, plain_bytes), (flex_s, flex_bytes) = found["plain"], found["flex"]
            table.add_row(
                str(length),
                str(rows),
                kind,
                f"{plain_s * 1e3:.2f} ms",
                f"{flex_s * 1e3:.2f} ms",
                f"{plain_s / flex_s:.2f}",
                f"{plain_bytes / 2**20:.0f} MiB",
                f"{flex_bytes / 2**20:.0f} MiB",
            )
    console.print(table)


def time_pass(name: str, mt5: MT5Config, rows: int, length: int, causal: bool, repeats: int) -> tuple[float, int]:
    """Return (median seconds, peak bytes beyond the inputs) of one forward and backward pass."""
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    query, key, value = (torch.randn(length, rows, mt5.num_heads, mt5.d_kv, **options) for _ in range(3))
    bias_table = torch.randn(mt5.relative_attention_num_buckets, mt5.num_heads, **options)
    segments = (torch.arange(length) >= length // 2).long().expand(rows, length) + 1
    on_gpu = segments.to("cuda")
    mask = Mask(segments, segments, causal).to_device(on_gpu, on_gpu)

    def forward() -> Tensor:
        bias = bias_by_distance(bias_table, mt5, length, not causal)
        return KERNELS[name](query, key, value, bias, mask, False)

    gradient = torch.randn_like(forward())
    taken = []
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(repeats + 3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        forward().backward(gradient)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[3:]), torch.cuda.max_memory_allocated() - before


def main(options: Options) -> None:
    """Print the tables of the chosen sections; raise ConfigurationError without a GPU."""
    if not torch.cuda.is_available():
        raise ConfigurationError("benchmarks.gpu needs a GPU and torch finds none; benchmarks.step measures on CPUs.")
    console = Console(width=130)
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    if "steps" in options.sections:
        steps(console, (options.batch, options.input_tokens, options.target_tokens), options.repeats)
    if "attention" in options.sections:
        attention(console, options.repeats)


if __name__ == "__main__":
    run_command(lambda words: main(parse(words, Options)))
