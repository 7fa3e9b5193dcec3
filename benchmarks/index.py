"""Measure the index of a source: making it, opening one of a billion records, drawing from it, resuming far ahead.

    python -m benchmarks.index
    python -m benchmarks.index records=1000000 shards=100

The large index is generated: its columns are holes of a sparse file, its tars 100,000 empty files. All else is what a
run does when it opens a source.
"""

import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.command_line import parse, run_command
from data.error_budget import Ledger
from data.interleave import interleave
from data.permutation import permuted
from data.shards import index as index_module
from data.shards.build import open_index
from data.shards.index import SourceIndex, _Writer
from data.shards.paths import Part, shard_paths
from data.shards.selection import BLOCK, Selection
from data.shards.source import ReadOptions, ShardSource, distinct, index_job
from data.shards.writer import write_shard

PROFILE = "alt_text=en captions=de,en,fr ocr=en questions=en:3"
PAPER = (100.0, 1000.0, 100.0, 100.0, 100.0, 100.0, 50.0, 16.0)
REPEATS = 5


@dataclass
class Options:
    """Hold the options of `python -m benchmarks.index key=value …`."""

    records: int = 1_000_000_000
    """Records of the generated index. A billion by default: a tenth of WebLI."""
    shards: int = 100_000
    """Its shards."""
    examined: int = 2_000
    """Records of the real shards that are indexed, each with an image of 0.3 megapixels."""


def anonymous_bytes() -> int:
    """Return the memory of this process that is no file's."""
    for line in Path("/proc/self/smaps_rollup").read_text("utf-8").splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no line of anonymous memory")


def timed(work: Callable[[], object], repeats: int = REPEATS) -> str:
    """Return the median and the spread of some runs, and the median of their CPU time, in seconds."""
    times, cpu = [], []
    for _ in range(repeats):
        began = time.perf_counter(), time.process_time()
        work()
        times.append(time.perf_counter() - began[0])
        cpu.append(time.process_time() - began[1])
    return f"{median(times):.3g} s ({min(times):.3g} to {max(times):.3g}; {median(cpu):.3g} s of CPU)"


@contextmanager
def generated(options: Options) -> Iterator[Path]:
    """Make the tars and the index of a source, whose records are never read."""
    with TemporaryDirectory(prefix="pali_benchmark_") as root:
        folder = Path(root, "webli")
        folder.mkdir()
        names = [f"{number:06d}.tar" for number in range(options.shards)]
        for name in names:
            (folder / name).touch()
        stamps = np.array([(0, os.stat(folder / name).st_mtime_ns) for name in names], np.int64)

        def counts(profiles: NDArray[np.uint32], table: NDArray[np.uint16]) -> NDArray[np.int64]:
            blocks = np.minimum(np.arange(-(-len(profiles) // BLOCK) + 1, dtype=np.int64) * BLOCK, len(profiles))
            return blocks * int(table[0])

        with ExitStack() as patches:  # a sparse file, whose 20 GB of zeros are not read to be counted
            patches.enter_context(patch.object(os, "posix_fallocate"))
            patches.enter_context(patch.object(index_module, "_crc", return_value=0))
            patches.enter_context(patch.object(index_module, "counts_before", counts))
            writer = _Writer(str(folder / "train.index"), options.records, 0, options.shards)
            writer.profiles[PROFILE] = 0
            writer.sections["ends"][:] = np.linspace(0, options.records, options.shards + 1, dtype=np.int64)[1:]
            writer.sections["stamps"][:] = stamps
            writer.finish(names, {})
            writer.file.close()
        yield folder


def large(options: Options) -> Iterator[str]:
    """Yield lines about a source of many records: opening it, its memory, drawing from it."""
    with generated(options) as folder:
        size = (folder / "train.index").stat().st_size
        yield f"generated: {options.records:,} records in {options.shards:,} shards"
        yield f"disk: {size / options.records:.2f} bytes a record"
        before = anonymous_bytes()
        began = time.perf_counter()
        source = ShardSource("webli", str(folder), "train", Ledger(1.0, 10**9))
        usable = source.usable("captioning", None, items=False)
        yield f"first opening (listing, comparing every tar): {time.perf_counter() - began:.2f} s"
        used = anonymous_bytes() - before
        yield f"private memory: {used / 1e6:.0f} MB, {used / options.records:.3f} bytes a record"
        yield f"opening again: {timed(lambda: ShardSource('webli', str(folder), 'train', Ledger(1.0, 10**9)))}"
        yield f"opening the index alone: {timed(lambda: SourceIndex(str(folder / 'train.index')))}"
        yield from drawing(usable)


def drawing(usable: Selection) -> Iterator[str]:
    """Yield lines about the time of a step of 4,096 draws, early and late in a run."""
    order = interleave(PAPER)

    def step(number: int) -> None:
        for example in range(4096 * number, 4096 * (number + 1)):
            _, count = order.place(example)
            epoch, place = divmod(count, len(usable))
            usable[permuted(place, len(usable), epoch)]

    for number in (10, 1_000_000):
        yield f"drawing the 4,096 records of step {number:,}: {timed(lambda: step(number))}"  # noqa: B023


def small(options: Options) -> Iterator[str]:
    """Yield lines about making an index of real shards in one process."""
    rng = np.random.default_rng(0)
    image = io.BytesIO()
    pixels = np.asarray(Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((640, 480)))
    Image.fromarray(pixels).save(image, "JPEG", quality=95)
    fields = {"alt_text": "a dog on a beach", "language": "en", "captions": {"en": "a dog", "de": "ein Hund"}}
    with TemporaryDirectory(prefix="pali_benchmark_") as root:
        samples = [(f"{n:06d}", {**fields, "ocr": [{"text": "EXIT"}]} if n % 50 == 0 else fields, image.getvalue())
                   for n in range(options.examined)]  # fmt: skip
        for shard in range(2):
            write_shard(Path(root, f"train-{shard}.tar"), samples[shard::2])
        job = index_job(root, "train", distinct(shard_paths(root, "train")), Part(), ReadOptions())

        def make() -> None:
            Path(job.target).unlink(missing_ok=True)
            open_index(job, num_processes=1)

        began = time.process_time()
        make()
        rate = options.examined / (time.process_time() - began)
        yield f"making an index: {rate:,.0f} records a second of CPU ({len(image.getvalue()) / 1024:.0f} KiB an image)"
        source = ShardSource("webli", root, "train", Ledger(1.0, 0))
        found = source.usable("ocr", None, items=False)
        with_text = sum(bool(source.read(found[k % len(found)][0]).fields.get("ocr")) for k in range(64))
        yield f"OCR in 2 % of the records: {with_text} of 64 draws have it (by rejection of 16 in a row: 22)"
        yield f"reading a record: {timed(lambda: [source[n] for n in range(0, options.examined, 2)])} for each 1,000"


def main(arguments: Sequence[str]) -> None:
    """Print what is measured."""
    options = parse(arguments, Options)
    for line in (*small(options), *large(options)):
        print(line, flush=True)
    order, shares = interleave(PAPER), np.array(PAPER) / sum(PAPER)
    places = np.arange(1, len(order.components) + 1)
    most = max(np.abs(np.cumsum(order.components == k) - places * share).max() for k, share in enumerate(shares))
    print(f"the paper's mixture: a component's count is at most {most:.4f} from its share, at any place")


if __name__ == "__main__":
    sys.exit(run_command(main))
