"""Measure examples per second on a mixture's real lengths: packed rows here, padded batches at Hugging Face.

    python -m data.miniature folder=runs/corpus && python -m data.tokenizer root=runs/corpus
    python -m benchmarks.packing                          # pali_mini on the miniature mixture
    python -m benchmarks.packing experiment=demo weights.vit=null hugging_face_batch_size=32

Keys that are not options of this command override conf/pretrain.yaml. Both sides train on the same examples of the
same steps, one update per step. Ours reads the rows that the data pipeline packs. Hugging Face's has one example per
row, padded to the longest of its batch, with a blank image for a text without one.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.sides import Example, Setting, hugging_face, ours, padded
from benchmarks.step import alternate
from benchmarks.worker import Worker
from common.command_line import run_command, split_own
from data.digest import open_stream
from data.packing import Rows, micro_batches
from data.stream import Stream
from model.batch import MicroBatch
from model.describe import read_model

TRIM = 16  # positions; data.trim_multiple of the miniature corpus


@dataclass
class Options:
    """Measure examples per second: packed rows here, padded batches at Hugging Face."""

    micro_batch_size: int = 12
    """Rows of ours per forward pass."""
    hugging_face_batch_size: int = 16
    """Examples of Hugging Face's per forward pass."""
    steps: int = 4
    """Different steps, taken in turns."""
    repeats: int = 12
    """Timed steps of each side, after two warm-up steps; the table shows the median."""
    precision: list[str] = field(default_factory=lambda: ["fp32", "bf16"])
    """Precisions to compare: fp32, bf16."""


def step_rows(stream: Stream, step: int) -> Rows:
    """Read the rows of one step, on all streams."""
    return stream.rows(step, range(stream.num_streams))[0]


def row_examples(rows: Rows, tokens_per_image: int) -> list[Example]:
    """Take packed rows apart into their examples, each with its first image."""
    found = []
    for row, segments in enumerate(rows["encoder_segments"]):
        for segment in range(1, segments.max(initial=0) + 1):
            mine, visual = segments == segment, rows["visual_index"][row]
            slots = np.unique(visual[mine & (visual >= 0)] // tokens_per_image)
            targets = rows["decoder_targets"][row][rows["decoder_segments"][row] == segment]
            image = torch.from_numpy(rows["images"][slots[0]]) if len(slots) else None
            inputs = rows["encoder_tokens"][row][mine & (visual < 0)]
            found.append(Example(image, inputs.tolist(), targets.tolist()))
    return found


def make_ours(overrides: Sequence[str], precision: str, steps: int, micro_batch_size: int) -> Callable[[], float]:
    """Make this system's side: steps over the packed rows of `steps` steps in turn."""
    stream, step = open_stream(overrides, "train"), ours(Setting(*read_model(overrides)), precision)
    packed = [
        micro_batches(step_rows(stream, number), micro_batch_size, stream.shape) for number in range(1, steps + 1)
    ]
    tokens = stream.shape.tokens_per_image
    trimmed = [
        [MicroBatch.from_rows(rows).trimmed(tokens, TRIM).joined(TRIM) for rows in of_step] for of_step in packed
    ]  # type: ignore
    batches = cycle(trimmed)
    return lambda: step(next(batches))


def make_hugging_face(
    overrides: Sequence[str], precision: str, steps: int, micro_batch_size: int
) -> Callable[[], float]:
    """Make Hugging Face's side: steps over the same examples, padded."""
    stream, setting = open_stream(overrides, "train"), Setting(*read_model(overrides))
    step = hugging_face(setting, precision)
    of_steps = []
    for number in range(1, steps + 1):
        examples = row_examples(step_rows(stream, number), stream.shape.tokens_per_image)
        parts = [examples[start : start + micro_batch_size] for start in range(0, len(examples), micro_batch_size)]
        of_steps.append([padded(part, setting.model.model.image_size) for part in parts])
    batches = cycle(of_steps)
    return lambda: step(next(batches))


def main(options: Options, overrides: Sequence[str]) -> None:
    """Print the table of both sides' examples per second."""
    stream = open_stream(overrides, "train")
    rows = [step_rows(stream, number) for number in range(1, options.steps + 1)]
    counts = [len(row_examples(part, stream.shape.tokens_per_image)) for part in rows]
    console = Console(width=120)
    mean_rows = statistics.mean(len(part["encoder_tokens"]) for part in rows)
    console.print(
        f"{statistics.mean(counts):.0f} examples a step in {mean_rows:.1f} "
        f"rows of {stream.shape.encoder_length} + {stream.shape.decoder_length} positions"
    )
    table = Table(title=f"training, examples/s, {torch.get_num_threads()} threads, median of {options.repeats}")
    for name in ("precision", "ours, packed", "Hugging Face, padded", "ours / HF", "memory ours", "memory HF"):
        table.add_column(name, justify="right", no_wrap=True)
    for precision in options.precision:
        sides = [
            Worker(make_ours, overrides, precision, options.steps, options.micro_batch_size),
            Worker(make_hugging_face, overrides, precision, options.steps, options.hugging_face_batch_size),
        ]
        seconds = alternate(sides, options.repeats)
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
    run_command(lambda words: main(*split_own(words, Options)))
