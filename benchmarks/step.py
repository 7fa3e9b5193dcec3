"""Time a training step (forward, backward, update) beside Hugging Face's MT5 + ViT, with both peak memories.

    python -m benchmarks.step                                # ViT-B + mT5-small, batch 4, 32/32 text tokens
    python -m benchmarks.step vit=mini mt5=mini batch=16 repeats=20

Each side runs in its own process, and steps alternate, so that both see the same machine. A plain matrix product of
each of the model's largest shapes is timed too: the fastest is the machine's own peak.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.sides import Example, Setting, hugging_face, one_per_row, ours, padded
from benchmarks.worker import Worker
from common.command_line import parse, run_command
from common.values import one_of
from model.config import PaLIConfig
from model.costs import batch_flops
from model.describe import one_example, read_model
from model.pali import plan_on_meta

FROZEN = ["patches.*", "vit_block_*", "bridge.vit_norm.*"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Options:
    """Time a training step beside Hugging Face's MT5 + ViT, with both peak memories."""

    vit: str = "base"
    """A file of conf/vit."""
    mt5: str = "small"
    """A file of conf/mt5."""
    image_size: int = 224
    """Height and width of images, in pixels."""
    batch: int = 4
    """Examples of a step, one per row."""
    input_tokens: int = 32
    """Tokens of text that each example adds to the encoder."""
    target_tokens: int = 32
    """Tokens of each example's target."""
    repeats: int = 9
    """Timed steps of each side, after two warm-up steps; the table shows the median."""
    precision: list[str] = field(default_factory=lambda: ["fp32", "bf16"])
    """Precisions to compare: fp32, bf16."""
    vision: list[str] = field(default_factory=lambda: ["frozen", "trained"])
    """Whether the ViT is frozen or trained; both by default."""

    def __post_init__(self) -> None:
        """Raise ConfigurationError for an unknown precision or vision."""
        for value in self.precision:
            one_of("precision", value, tuple(DTYPES))
        for value in self.vision:
            one_of("vision", value, ("frozen", "trained"))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (examples, input tokens, target tokens)."""
        return self.batch, self.input_tokens, self.target_tokens


def examples(config: PaLIConfig, batch: int, input_tokens: int, target_tokens: int) -> list[Example]:
    """Make random images and ids, all of the same lengths."""
    generator = torch.Generator().manual_seed(0)
    size = config.model.image_size

    def ids(count: int) -> list[int]:
        return torch.randint(3, config.mt5.vocab_size, (count,), generator=generator).tolist()

    images = torch.randint(0, 256, (batch, size, size, 3), generator=generator).to(torch.uint8)
    return [Example(image, ids(input_tokens), ids(target_tokens)) for image in images]


def make_ours(setting: Setting, precision: str, *shape: int) -> Callable[[], float]:
    """Make this system's side: a step on one batch of `shape` (see `Options.shape`)."""
    step, batch = ours(setting, precision), one_per_row(examples(setting.model, *shape), setting.model)
    return lambda: step([batch])


def make_hugging_face(setting: Setting, precision: str, *shape: int) -> Callable[[], float]:
    """Make Hugging Face's side: a step on the same batch."""
    image_size = setting.model.model.image_size
    step, batch = hugging_face(setting, precision), padded(examples(setting.model, *shape), image_size)
    return lambda: step([batch])


def alternate(sides: list[Worker], repeats: int, warm_up: int = 2) -> list[list[float]]:
    """Take steps of all sides in turns, in an order that alternates; return each side's seconds."""
    seconds: list[list[float]] = [[] for _ in sides]
    for turn in range(warm_up + repeats):
        order = range(len(sides)) if turn % 2 else reversed(range(len(sides)))
        for side in order:
            taken = sides[side].step()
            if turn >= warm_up:
                seconds[side].append(taken)
    return seconds


def matrix_product(tokens: int, d_in: int, d_out: int, dtype: torch.dtype, repeats: int = 7) -> float:
    """Return the median FLOP/s of x [tokens, d_in] times transposed weights [d_out, d_in]."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight = (
        torch.randn(tokens, d_in, dtype=dtype, device=device),
        torch.randn(d_out, d_in, dtype=dtype, device=device),
    )
    taken = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return 2.0 * tokens * d_in * d_out / statistics.median(taken[2:])


def largest_shapes(
    config: PaLIConfig, batch: int, input_tokens: int, target_tokens: int
) -> dict[str, tuple[int, int, int]]:
    """Return (tokens, d_in, d_out) of the widest product of each part of the model."""
    visual = config.tokens_per_image
    return {
        "vocabulary": (batch * target_tokens, config.mt5.d_model, config.mt5.vocab_size),
        "ViT MLP": (batch * visual, config.vit.width, config.vit.mlp_dim),
        "encoder MLP": (batch * (visual + input_tokens), config.mt5.d_model, 2 * config.mt5.d_ff),
    }


def compare(
    setting: Setting, precision: str, shape: tuple[int, int, int], repeats: int
) -> tuple[list[float], list[int], float]:
    """Return median seconds and peak bytes of (ours, Hugging Face), and the median of their time ratios."""
    sides = [Worker(make, setting, precision, *shape) for make in (make_ours, make_hugging_face)]
    seconds = alternate(sides, repeats)
    peaks = [side.close() for side in sides]
    ratio = statistics.median(theirs / mine for mine, theirs in zip(*seconds, strict=True))
    return [statistics.median(taken) for taken in seconds], peaks, ratio


def table_row(options: Options, setting: Setting, precision: str, peak_gflops: float) -> list[str]:
    """Measure both sides at one precision, with `setting.frozen`, and return the table's cells."""
    shape = options.shape
    plan = plan_on_meta(setting.model, setting.frozen)
    flops = shape[0] * batch_flops(plan.units(), one_example(setting.model, *shape[1:]))
    medians, memory, ratio = compare(setting, precision, shape, options.repeats)
    return [
        precision,
        "frozen" if setting.frozen else "trained",
        *(f"{seconds:.3f} s" for seconds in medians),
        f"{ratio:.2f}",
        f"{flops / medians[0] / peak_gflops / 1e9:.0%}",
        *(f"{size / 2**30:.2f} GiB" for size in memory),
    ]


def main(options: Options) -> None:
    """Print the machine's own peak and the table of steps."""
    console = Console(width=130)
    config, _ = read_model([f"vit={options.vit}", f"mt5={options.mt5}"])
    config.model.image_size = options.image_size
    peaks: dict[str, float] = {}
    for precision in options.precision:
        shapes = largest_shapes(config, *options.shape)
        found = {name: matrix_product(*shape, DTYPES[precision]) / 1e9 for name, shape in shapes.items()}
        peaks[precision] = max(found.values())
        console.print(f"{precision} matrix products: " + ", ".join(f"{k} {v:.0f} GFLOP/s" for k, v in found.items()))

    table = Table(
        title=f"one step: ViT {options.vit} + mT5 {options.mt5}, batch {options.batch}, text {options.input_tokens}/"
        f"{options.target_tokens} tokens, {torch.get_num_threads()} threads, median of {options.repeats}"
    )
    for name in ("precision", "ViT", "ours", "Hugging Face", "HF / ours", "ours of peak", "memory ours", "memory HF"):
        table.add_column(name, justify="right", no_wrap=True)
    for precision in options.precision:
        for vision in options.vision:
            setting = Setting(config, FROZEN if vision == "frozen" else [])
            row = table_row(options, setting, precision, peaks[precision])
            console.print("  ".join(row))  # at once, because each row takes minutes
            table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    run_command(lambda words: main(parse(words, Options)))
