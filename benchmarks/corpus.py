"""Measure the building of a corpus: images per second and core of each step, planted duplicates, ranks.

    python -m benchmarks.corpus images=2000 folder=runs/benchmark_corpus

benchmarks/corpus.md holds the results. Images are drawn: blurred noise of several scales, with shapes.
"""

import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from common.command_line import parse, run_command
from common.values import PATH, at_least
from data.corpus.config import DuplicateConfig, ImageConfig, OcrConfig
from data.corpus.steps import hashes, images, neighbors
from data.corpus.steps.hashes import ENTRY, IMAGE
from data.corpus.steps.language import identify
from data.corpus.steps.ocr import BoundedEngine
from data.shards.writer import write_shard

TEXT = "a brown dog runs across the wet grass of the park"
TIMED = 200  # images that a step is timed on


@dataclass
class Options:
    """Options of this command."""

    folder: str = field(default="runs/benchmark_corpus", metadata=PATH)
    """Folder for the downloads and the corpora; what it holds of them is replaced."""
    images: int = 2000
    """Images of the downloads, in tars of 250."""
    ocr: str = "tesseract"
    """Engine that is timed, or none."""

    def __post_init__(self) -> None:
        at_least("", 500, images=self.images)


def photo(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """Draw an image with the spectrum of a photograph: blurred noise of several scales, and some shapes."""
    rng = np.random.default_rng(seed)
    mixed = np.zeros((height, width, 3))
    for power, side in enumerate((3, 6, 12, 24)):
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        mixed += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), float) / 2**power
    image = Image.fromarray((mixed / mixed.max() * 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = rng.integers(0, width - 30), rng.integers(0, height - 30)
        box = (x, y, x + rng.integers(15, 60), y + rng.integers(15, 60))
        draw.ellipse(box, tuple(rng.integers(0, 256, 3).tolist()))
    return image


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    """Return an image as JPEG."""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality)
    return content.getvalue()


def cropped(image: Image.Image, share: float, seed: int) -> Image.Image:
    """Return a crop of a share of each side, at a random place."""
    rng = np.random.default_rng(seed)
    width, height = round(image.width * share), round(image.height * share)
    left, top = rng.integers(0, image.width - width + 1), rng.integers(0, image.height - height + 1)
    return image.crop((int(left), int(top), int(left) + width, int(top) + height))


def watermarked(image: Image.Image) -> Image.Image:
    """Return an image with a line of text over its lower part."""
    marked = image.copy()
    ImageDraw.Draw(marked).text((image.width // 10, image.height * 4 // 5), "(c) example.org", (230, 230, 230))
    return marked


COPIES: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "recompressed, quality 30": lambda image, seed: Image.open(io.BytesIO(jpeg(image, 30))),
    "half size": lambda image, seed: image.resize((image.width // 2, image.height // 2)),
    "watermark": lambda image, seed: watermarked(image),
    "mirror image": lambda image, seed: ImageOps.mirror(image),
    "crop of 95 % a side": lambda image, seed: cropped(image, 0.95, seed),
    "crop of 90 % a side": lambda image, seed: cropped(image, 0.9, seed),
    "crop of 80 % a side": lambda image, seed: cropped(image, 0.8, seed),
}


def planted(number: int) -> dict[str, tuple[int, int]]:
    """Return (copies, copies that are found) by kind; under "other images" those that are taken for copies."""
    found, originals = {}, [photo(seed, 320, 240) for seed in range(number)]
    first = [_hashed(row, image) for row, image in enumerate(originals)]
    for name, change in COPIES.items():
        copies = [_hashed(number + row, change(image, row)) for row, image in enumerate(originals)]
        edges = neighbors.edges(np.concatenate([*first, *copies]), {IMAGE: 31}, 0, 10)
        right = edges["row"] == edges["other"] + number
        found[name] = (number, int(right.sum()))
    edges = neighbors.edges(np.concatenate(first), {IMAGE: 31}, 0, 10)
    return found | {"other images": (number, len(edges))}


def _hashed(row: int, image: Image.Image) -> NDArray[np.void]:
    config = DuplicateConfig()
    made = hashes.image_hashes(np.asarray(image.convert("RGB")), config.crops)
    return np.concatenate([np.zeros(0, ENTRY), *hashes.image_entries("web", row, made, config.band_bits, 0)])


def steps(engine: str) -> dict[str, float]:
    """Return the rows that one core does in a second of CPU time, by step; OCR's are of the clock."""
    contents = [jpeg(photo(seed, 640, 480)) for seed in range(20)]
    pixels = [images.look(content, ImageConfig()).pixels for content in contents]
    document = " ".join(f"{TEXT} {n}" for n in range(40))
    timed: dict[str, Callable[[int], object]] = {
        "decode and judge an image (640 x 480)": lambda n: images.look(contents[n % 20], ImageConfig()),
        "hash an image, its mirror image and 2 crops": lambda n: hashes.image_hashes(pixels[n % 20], (0.9, 0.8)),
        "its 96 entries": lambda n: hashes.image_entries("web", n, [np.arange(4, dtype="<u8") + n] * 6, 16, 0),
        "hash a document of 440 words": lambda n: hashes.text_entries("text", n, document, 0),
        "identify a language by fasttext": lambda n: identify(f"{TEXT} {n}", ["fasttext"]),
    }
    found = {name: _rate(work, TIMED, time.process_time) for name, work in timed.items()}
    if engine != "none":
        with BoundedEngine(OcrConfig(engine=engine, timeout_s=120)) as run:
            run(pixels[0])
            found[f"OCR by {engine}, English"] = _rate(lambda n: run(pixels[n % 20]), 10, time.perf_counter)
    return found


def _rate(work: Callable[[int], object], number: int, clock: Callable[[], float]) -> float:
    work(0)
    start = clock()
    for each in range(number):
        work(each)
    return number / (clock() - start)


def builds(options: Options) -> dict[int, float]:
    """Return the rows a second of whole builds by 1 and 2 ranks, start included. Raises RuntimeError if one fails."""
    root = Path(options.folder)
    shutil.rmtree(root, ignore_errors=True)
    for tar in range(options.images // 250):
        numbers = range(tar * 250, tar * 250 + 250)
        write_shard(
            root / "downloads" / f"{tar:05d}.tar",
            ((f"{n:09d}", {"caption": f"{TEXT} {n}"}, jpeg(photo(n, 320, 240))) for n in numbers),
        )
    found = {}
    for ranks in (1, 2):
        mpirun = [str(Path(sys.executable).parent / "mpirun"), "-n", str(ranks)] if ranks > 1 else []
        command = [*mpirun, sys.executable, "-m", "data.corpus.build", f"folder={root / str(ranks)}"]
        start = time.perf_counter()
        words = [f"inputs.web.path={root / 'downloads'}", "language.engines=[fasttext]", "shard_records=500"]
        done = subprocess.run([*command, *words], capture_output=True, encoding="utf-8")
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        found[ranks] = options.images / (time.perf_counter() - start)
    return found


def main(words: Sequence[str]) -> None:
    """Print the results as JSON."""
    options = parse(words, Options)
    print(json.dumps({"copies": planted(300)}, indent=1), flush=True)
    print(json.dumps({"rows a second and core": steps(options.ocr)}, indent=1), flush=True)
    print(json.dumps({"rows a second of a build, by ranks": builds(options)}, indent=1), flush=True)


if __name__ == "__main__":
    run_command(main)
