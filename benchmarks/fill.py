"""Measure how full the rows of the paper's mixture are, and how evenly ranks share them.

    python -m benchmarks.fill
    python -m benchmarks.fill steps=20 pools=[128,1024] scales=[0.7,1,1.4]

Lengths are those of benchmarks/lengths.py. Positions count as real where they hold a visual token, text or EOS; what
the last micro-batch of a rank is filled up with, and what a rank waits for while the fullest one computes, is in the
column of ranks.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.lengths import LENGTHS, STAGE_2, draw
from common.command_line import run_command, split_own
from data.row_assignment import assign_rows, stream_of_rows

NAMES = ("encoder", "decoder", "image slots")


@dataclass
class Options:
    """Measure the fill of rows."""

    steps: int = 8
    """Steps of each line."""
    pools: list[int] = field(default_factory=lambda: [128, 256, 512, 1024])
    """Values of data.pool_examples."""
    scales: list[float] = field(default_factory=lambda: [0.7, 1.0, 1.4])
    """Factors of the lengths of texts, with the same rows: other corpora than the table's."""
    ranks: list[int] = field(default_factory=lambda: [8, 64, 128, 256])
    """Data-parallel sizes."""


@dataclass
class Setting:
    """Rows and batch of one phase."""

    batch: int
    streams: int
    tokens_per_image: int
    capacity: tuple[int, int, int]
    longest_target: int
    names: tuple[str, ...]
    equally: bool


FIRST = Setting(4096, 256, 256, (4688, 400, 17), 320, tuple(LENGTHS), False)
WEB = Setting(4096, 64, 256, (1152, 128, 4), 128, tuple(LENGTHS), False)  # conf/data/web.yaml
SECOND = Setting(1024, 256, 1764, (3648, 128, 2), 128, STAGE_2, True)


def one_step(setting: Setting, pool: int, scale: float, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the fill of a step's rows, its rows by stream, and seconds of one pool's assignment."""
    rng = np.random.default_rng(seed)
    capacity = np.array(setting.capacity)
    _, sizes = draw(
        rng, setting.batch, setting.tokens_per_image, setting.longest_target, scale, setting.names, setting.equally
    )
    streams = setting.streams * pool // setting.batch
    counts, seconds = [], 0.0
    for start in range(0, setting.batch, pool):
        began = time.perf_counter()
        _, number = assign_rows(sizes[start : start + pool], capacity, streams)
        seconds += time.perf_counter() - began
        counts.append(np.bincount(stream_of_rows(number, streams), minlength=streams))
    by_stream = np.concatenate(counts)
    return sizes.sum(0) / capacity / by_stream.sum(), by_stream, seconds * pool / setting.batch


def measure(
    console: Console, title: str, setting: Setting, options: Options, lines: Sequence[tuple[int, float]]
) -> None:
    """Print one line for each (pool, scale)."""
    ranks = [number for number in options.ranks if setting.streams % number == 0]
    table = Table(title=f"{title}, rows of {' + '.join(map(str, setting.capacity))}, {options.steps} steps")
    columns = ("pool", "scale", "rows", *NAMES, *(f"fullest of {n}" for n in ranks), "ms a pool")
    for name in columns:
        table.add_column(name, justify="right")
    for pool, scale in lines:
        found = [one_step(setting, pool, scale, seed) for seed in range(options.steps)]
        fills = np.mean([fill for fill, _, _ in found], 0)
        fullest = []
        for number in ranks:
            of_ranks = [by_stream.reshape(number, -1).sum(1) for _, by_stream, _ in found]
            fullest.append(
                f"+{statistics.mean(float(c.max() / c.mean()) for c in of_ranks) - 1:.1%}, "
                f"{max(float(c.max() - c.mean()) for c in of_ranks):.2f} rows"
            )
        rows = statistics.mean(int(by_stream.sum()) for _, by_stream, _ in found)
        seconds = statistics.median(taken for _, _, taken in found)
        table.add_row(
            str(pool), f"{scale:g}", f"{rows:.1f}", *(f"{fill:.1%}" for fill in fills), *fullest, f"{1e3 * seconds:.0f}"
        )
    console.print(table)


def lengths(console: Console) -> None:
    """Print the table of lengths."""
    table = Table(title="pieces with EOS, 5th, 50th and 95th percentile (mean)")
    for name in ("objective", "share", "prompt", "target", "source"):
        table.add_column(name)
    total = sum(one.weight for one in LENGTHS.values())
    for name, one in LENGTHS.items():
        _, sizes = draw(np.random.default_rng(0), 4000, 0, FIRST.longest_target, names=(name,))
        texts = []
        for column in (0, 1):
            low, middle, high = np.percentile(sizes[:, column], [5, 50, 95])
            texts.append(f"{low:.0f} {middle:.0f} {high:.0f} ({sizes[:, column].mean():.1f})")
        table.add_row(name, f"{one.weight / total:.1%}", *texts, one.source)
    console.print(table)


def main(options: Options, overrides: Sequence[str]) -> None:
    """Print the tables."""
    console = Console(width=160)
    lengths(console)
    by_pool = [(pool, 1.0) for pool in options.pools if FIRST.batch % pool == 0]
    measure(console, "first phase, 4,096 examples at 224 px", FIRST, options, by_pool)
    whole = replace(FIRST, longest_target=FIRST.capacity[1])
    measure(console, "the same, with targets as long as a row", whole, options, [(1024, 1.0)])
    measure(console, "other lengths", FIRST, options, [(1024, scale) for scale in options.scales])
    measure(console, "data=web", WEB, options, [(1024, 1.0)])
    measure(console, "second phase, 1,024 examples at 588 px", SECOND, options, [(128, 1.0), (1024, 1.0)])


if __name__ == "__main__":
    run_command(lambda words: main(*split_own(words, Options)))
