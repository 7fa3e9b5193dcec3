"""Times a training step (forward, backward, update) beside Hugging Face's MT5 + ViT, and shows both peak memories.

    python -m benchmarks.step                                # ViT-B + mT5-small, batch 4, 32/32 text tokens
    python -m benchmarks.step --vit mini --mt5 mini --batch 16 --repeats 20

Each side runs in its own process; steps alternate, so that both see the same machine. Also timed: a plain matrix
product of each of the model's largest shapes, whose best is the machine's own peak.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.sides import Example, hugging_face, one_per_row, ours, padded
from benchmarks.worker import Worker
from common.terminal import use_utf8
from model.costs import batch_flops
from model.describe import Sizes, one_example, plan, read_sizes

FROZEN = ["patches.*", "vit_block_*", "bridge.vit_norm.*"]


def examples(sizes: Sizes, batch: int, input_tokens: int, target_tokens: int) -> list[Example]:
    """Random pictures and ids, all of the same lengths."""
    generator = torch.Generator().manual_seed(0)
    size = sizes.model.image_size

    def ids(count: int) -> list[int]:
        return torch.randint(3, sizes.mt5.vocab_size, (count,), generator=generator).tolist()

    pictures = torch.randint(0, 256, (batch, size, size, 3), generator=generator).to(torch.uint8)
    return [Example(picture, ids(input_tokens), ids(target_tokens)) for picture in pictures]


def make_ours(sizes: Sizes, precision: str, *shape: int) -> Callable[[], float]:
    step, batch = ours(sizes, precision), one_per_row(examples(sizes, *shape), sizes)
    return lambda: step([batch])


def make_hugging_face(sizes: Sizes, precision: str, *shape: int) -> Callable[[], float]:
    step, batch = hugging_face(sizes, precision), padded(examples(sizes, *shape), sizes.model.image_size)
    return lambda: step([batch])


def alternate(sides: list[Worker], repeats: int, warm_up: int = 2) -> list[list[float]]:
    """Seconds of each side's steps, taken in turns; the order within a pair changes from one to the next."""
    seconds: list[list[float]] = [[] for _ in sides]
    for turn in range(warm_up + repeats):
        order = range(len(sides)) if turn % 2 else reversed(range(len(sides)))
        for side in order:
            taken = sides[side].step()
            if turn >= warm_up:
                seconds[side].append(taken)
    return seconds


def matrix_product(tokens: int, d_in: int, d_out: int, dtype: torch.dtype, repeats: int = 7) -> float:
    """FLOP/s of x [tokens, d_in] times weights [d_out, d_in] transposed: the median."""
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


def largest_shapes(sizes: Sizes, batch: int, input_tokens: int, target_tokens: int) -> dict[str, tuple[int, int, int]]:
    """(tokens, d_in, d_out) of the widest product of each part of the model."""
    visual = sizes.vit.num_tokens(sizes.model.image_size)
    return {
        "vocabulary": (batch * target_tokens, sizes.mt5.d_model, sizes.mt5.vocab_size),
        "ViT MLP": (batch * visual, sizes.vit.width, sizes.vit.mlp_dim),
        "encoder MLP": (batch * (visual + input_tokens), sizes.mt5.d_model, 2 * sizes.mt5.d_ff),
    }


def compare(
    sizes: Sizes, precision: str, shape: tuple[int, int, int], repeats: int
) -> tuple[list[float], list[int], float]:
    """Median seconds and peak bytes of (ours, Hugging Face), and the median of the pairwise time ratios."""
    sides = [Worker(make, sizes, precision, *shape) for make in (make_ours, make_hugging_face)]
    seconds = alternate(sides, repeats)
    peaks = [side.close() for side in sides]
    ratio = statistics.median(theirs / mine for mine, theirs in zip(*seconds, strict=True))
    return [statistics.median(taken) for taken in seconds], peaks, ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vit", default="base")
    parser.add_argument("--mt5", default="small")
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--batch", type=int, default=4, help="examples, one per row")
    parser.add_argument("--input-tokens", type=int, default=32)
    parser.add_argument("--target-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--vision", nargs="+", default=["frozen", "trained"], choices=["frozen", "trained"])
    chosen = parser.parse_args()
    shape = (chosen.batch, chosen.input_tokens, chosen.target_tokens)
    console = Console(width=130)

    sizes = read_sizes([f"vit={chosen.vit}", f"mt5={chosen.mt5}"])
    sizes.model.image_size = chosen.image_size
    peaks: dict[str, float] = {}
    for precision in chosen.precision:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        found = {name: matrix_product(*s, dtype) / 1e9 for name, s in largest_shapes(sizes, *shape).items()}
        peaks[precision] = max(found.values())
        console.print(f"{precision} matrix products: " + ", ".join(f"{k} {v:.0f} GFLOP/s" for k, v in found.items()))

    table = Table(
        title=f"one step: ViT {chosen.vit} + mT5 {chosen.mt5}, batch {shape[0]}, text {shape[1]}/{shape[2]} tokens, "
        f"{torch.get_num_threads()} threads, median of {chosen.repeats}"
    )
    for name in ("precision", "ViT", "ours", "Hugging Face", "HF / ours", "ours of peak", "memory ours", "memory HF"):
        table.add_column(name, justify="right", no_wrap=True)
    for precision in chosen.precision:
        for vision in chosen.vision:
            setting = Sizes(sizes.vit, sizes.mt5, sizes.model, FROZEN if vision == "frozen" else [])
            flops = shape[0] * batch_flops(plan(setting).units(), one_example(setting, *shape[1:]))
            medians, memory, ratio = compare(setting, precision, shape, chosen.repeats)
            row = [
                precision,
                vision,
                *(f"{seconds:.3f} s" for seconds in medians),
                f"{ratio:.2f}",
                f"{flops / medians[0] / peaks[precision] / 1e9:.0%}",
                *(f"{size / 2**30:.2f} GiB" for size in memory),
            ]
            console.print("  ".join(row))  # already, for it takes a while
            table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    use_utf8()
    main()
