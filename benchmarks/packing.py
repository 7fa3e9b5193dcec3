"""Examples per second on a mixture with its real lengths: packed rows here, padded batches at Hugging Face.

    python -m data.miniature folder=runs/corpus && python -m data.tokenizer root=runs/corpus
    python -m benchmarks.packing                          # pali_mini on the miniature mixture
    python -m benchmarks.packing experiment=demo "run.initial_weights=[]" --hugging-face-batch 32

Both sides train on the same examples of the same steps, one update per step: ours as the rows that the data pipeline
packs, Hugging Face's one example per row, padded to the longest of its batch (texts without a picture get a blank one).
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from itertools import cycle

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.sides import Example, hugging_face, ours, padded
from benchmarks.step import alternate
from benchmarks.worker import Worker
from common.terminal import use_utf8
from data.digest import open_stream
from data.packing import Rows, micro_batches
from data.stream import Stream
from model.batch import MicroBatch
from model.describe import read_sizes

TRIM = 16  # positions; data.trim_multiple of the miniature corpus


def rows_of(stream: Stream, step: int) -> Rows:
    return stream.rows(step, range(stream.num_streams))[0]


def examples_of(rows: Rows, tokens_per_image: int) -> list[Example]:
    """The examples of packed rows, each with its first picture."""
    found = []
    for row, segments in enumerate(rows["encoder_segments"]):
        for segment in range(1, segments.max(initial=0) + 1):
            mine, visual = segments == segment, rows["visual_index"][row]
            slots = np.unique(visual[mine & (visual >= 0)] // tokens_per_image)
            targets = rows["decoder_targets"][row][rows["decoder_segments"][row] == segment]
            picture = torch.from_numpy(rows["images"][slots[0]]) if len(slots) else None
            inputs = rows["encoder_tokens"][row][mine & (visual < 0)]
            found.append(Example(picture, inputs.tolist(), targets.tolist()))
    return found


def make_ours(overrides: Sequence[str], precision: str, steps: int, micro_batch_size: int) -> Callable[[], float]:
    stream, step = open_stream(overrides, "train"), ours(read_sizes(overrides), precision)
    packed = [micro_batches(rows_of(stream, number), micro_batch_size, stream.shape) for number in range(1, steps + 1)]
    tokens = stream.shape.tokens_per_image
    trimmed = [
        [MicroBatch.from_rows(rows).trimmed(tokens, TRIM).joined(TRIM) for rows in of_step] for of_step in packed
    ]  # type: ignore
    batches = cycle(trimmed)
    return lambda: step(next(batches))


def make_hugging_face(
    overrides: Sequence[str], precision: str, steps: int, micro_batch_size: int
) -> Callable[[], float]:
    stream, sizes = open_stream(overrides, "train"), read_sizes(overrides)
    step = hugging_face(sizes, precision)
    of_steps = []
    for number in range(1, steps + 1):
        examples = examples_of(rows_of(stream, number), stream.shape.tokens_per_image)
        parts = [examples[start : start + micro_batch_size] for start in range(0, len(examples), micro_batch_size)]
        of_steps.append([padded(part, sizes.model.image_size) for part in parts])
    batches = cycle(of_steps)
    return lambda: step(next(batches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of conf/pretrain.yaml")
    parser.add_argument("--micro-batch", type=int, default=12, help="rows of ours per forward pass")
    parser.add_argument("--hugging-face-batch", type=int, default=16, help="examples of theirs per forward pass")
    parser.add_argument("--steps", type=int, default=4, help="different steps, taken in turns")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    chosen = parser.parse_args()

    stream = open_stream(chosen.overrides, "train")
    rows = [rows_of(stream, number) for number in range(1, chosen.steps + 1)]
    counts = [len(examples_of(part, stream.shape.tokens_per_image)) for part in rows]
    console = Console(width=120)
    mean_rows = statistics.mean(len(part["encoder_tokens"]) for part in rows)
    console.print(
        f"{statistics.mean(counts):.0f} examples a step in {mean_rows:.1f} "
        f"rows of {stream.shape.encoder_length} + {stream.shape.decoder_length} positions"
    )
    table = Table(title=f"training, examples/s, {torch.get_num_threads()} threads, median of {chosen.repeats}")
    for name in ("precision", "ours, packed", "Hugging Face, padded", "ours / HF", "memory ours", "memory HF"):
        table.add_column(name, justify="right", no_wrap=True)
    for precision in chosen.precision:
        sides = [
            Worker(make_ours, chosen.overrides, precision, chosen.steps, chosen.micro_batch_size),
            Worker(make_hugging_face, chosen.overrides, precision, chosen.steps, chosen.hugging_face_batch),
        ]
        seconds = alternate(sides, chosen.repeats)
        peaks = [side.close() for side in sides]
        speeds = [statistics.mean(counts) / statistics.median(taken) for taken in seconds]
        ratio = statistics.median(theirs / mine for mine, theirs in zip(*seconds, strict=True))
        table.add_row(
            precision,
            *(f"{speed:.1f}" for speed in speeds),
            f"{ratio:.2f}",
            *(f"{peak / 2**30:.2f} GiB" for peak in peaks),
        )
    console.print(table)


if __name__ == "__main__":
    use_utf8()
    main()
