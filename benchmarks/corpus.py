"""Measure the building of a corpus: images per second and core of each step, planted duplicates, ranks.

    python -m benchmarks.corpus images=2000 photographs=/usr/share/backgrounds

benchmarks/corpus.md holds the results. Images are drawn (blurred noise of several scales, with shapes), and parts of
the photographs in a folder.
"""

import io
import json
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
from data.corpus.config import DuplicateConfig, ImageConfig, OcrConfig, TextConfig
from data.corpus.steps import features, hashes, images, neighbors, questions, rules, text
from data.corpus.steps.hashes import ENTRY, IMAGE, Entries
from data.corpus.steps.language import identify
from data.corpus.steps.ocr import BoundedEngine
from data.shards.writer import write_shard

TEXT = "a brown dog runs across the wet grass of the park"
CAPTIONS = (
    TEXT, "two children play with a red ball on the beach", "ein alter Mann liest auf der Bank die Zeitung von gestern",
    "старый дом у реки стоит в тени высоких деревьев", "una mujer camina por la calle bajo la lluvia de la tarde",
    "un petit bateau bleu attend dans le port de la vieille ville", "公园里的长椅上坐着一位老人和他的狗",
    "مدينة قديمة على شاطئ البحر عند غروب الشمس",
)  # fmt: skip
TIMED = 200  # images that a step is timed on


@dataclass
class Options:
    """Options of this command."""

    folder: str = field(default="runs/benchmark_corpus", metadata=PATH)
    """Folder for the downloads and the corpora; what it holds of them is replaced."""
    images: int = 2000
    """Images of the downloads, in tars of 1,000."""
    photographs: str = field(default="", metadata=PATH)
    """Folder of photographs that join the drawn images. Empty by default: none do."""
    number: int = 300
    """Images of each kind that copies are planted of."""
    parts: list[str] = field(default_factory=lambda: ["copies", "steps", "builds"])
    """What is measured."""
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


def tiles(folder: str, width: int = 640, height: int = 480) -> list[Image.Image]:
    """Return disjoint parts of the photographs in a folder, reduced to a width of 2,560 at most."""
    found = []
    for path in sorted(each for each in Path(folder).rglob("*") if each.suffix in (".jpg", ".png", ".webp")):
        image = Image.open(path).convert("RGB")
        image.thumbnail((2560, 2560))
        for top in range(0, max(image.height - height + 1, 1), height):
            for left in range(0, max(image.width - width + 1, 1), width):
                found.append(image.crop((left, top, min(left + width, image.width), min(top + height, image.height))))
    return found


def planted(originals: Sequence[Image.Image]) -> dict[str, tuple[int, int]]:
    """Return (copies, copies that are found) by kind; under "other images" those that are taken for copies."""
    first = [_hashed(row, image) for row, image in enumerate(originals)]
    compared = [row for row, made in enumerate(first) if len(made)]  # others are too plain, and compared by no one
    number = len(originals)
    found = {"images that can be compared": (number, len(compared))}
    for name, change in COPIES.items():
        copies = [_hashed(number + row, change(originals[row], row)) for row in compared]
        edges = _edges([*first, *copies])
        right = edges["row"] == edges["other"] + number
        found[name] = (len(compared), int(right.sum()))
    return found | {"other images": (len(compared), len(_edges(first)))}


def _edges(made: Sequence[Entries]) -> NDArray[np.void]:
    return neighbors.settled(neighbors.edges(np.concatenate(made), {IMAGE: DuplicateConfig().image_distance}, 0, 10))


def _hashed(row: int, image: Image.Image) -> Entries:
    # As a build sees it: compressed, decoded at 512 pixels at most
    pixels = images.look(jpeg(image.convert("RGB")), ImageConfig(), curated=True).pixels
    return np.concatenate([np.zeros(0, ENTRY), *features.compared("web", row, pixels, DuplicateConfig(), 0)])


def steps(engine: str) -> dict[str, float]:
    """Return the rows that one core does in a second of CPU time, by step; OCR's are of the clock."""
    contents = [jpeg(photo(seed, 640, 480)) for seed in range(20)]
    pixels = [images.look(content, ImageConfig()).pixels for content in contents]
    document = " ".join(f"{TEXT} {n}" for n in range(40))
    found = [features.features(each, 48) for each in pixels]
    hashed = np.concatenate([np.concatenate([_hashed(n, photo(n)), _hashed(n + 200, photo(n))]) for n in range(200)])
    timed: dict[str, Callable[[int], object]] = {
        "decode and judge an image (640 x 480)": lambda n: images.look(contents[n % 20], ImageConfig()),
        "hash an image and its mirror image": lambda n: hashes.image_hashes(pixels[n % 20]),
        "find its 48 features": lambda n: features.features(pixels[n % 20], 48),
        "its 224 entries": lambda n: (
            hashes.image_entries("web", n, [np.arange(4, dtype="<u8") + n] * 2, 16, 0),
            features.feature_entries("web", n, found[n % 20], 0),
        ),
        "hash a document of 440 words": lambda n: hashes.text_entries("text", n, document, 0),
        "identify a language by fasttext": lambda n: identify(f"{TEXT} {n}", ["fasttext"]),
        "judge an alt-text, and its rules": lambda n: rules.check(
            ["pii", "adult_words"], {"alt_text": text.check_alt_text([f"{TEXT} {n}"], TextConfig())}, None
        ),
        "make questions of a caption": lambda n: questions.by_rules(f"two brown dogs on the wet grass {n}"),
    }
    rates = {name: _rate(work, TIMED, time.process_time) for name, work in timed.items()}
    # Half of these 400 images are copies of the others
    rates["compare an image's entries"] = 400 * _rate(lambda n: _edges([hashed]), 5, time.process_time)
    if engine != "none":
        with BoundedEngine(OcrConfig(engine=engine, timeout_s=120)) as run:
            run(pixels[0])
            rates[f"OCR by {engine}, English"] = _rate(lambda n: run(pixels[n % 20]), 10, time.perf_counter)
    return rates


def _rate(work: Callable[[int], object], number: int, clock: Callable[[], float]) -> float:
    work(0)
    start = clock()
    for each in range(number):
        work(each)
    return number / (clock() - start)


def write_downloads(folder: Path, number: int, real: Sequence[Image.Image]) -> None:
    """Write tars of 1,000 samples: photographs, drawn images, and of both changed copies, faults, and 8 languages.

    A sample is a function of its number. Of 20: a photograph until each was used once, 15 drawn images, a changed copy
    of the photograph and one of a drawn image, an image that is too small, and one with a text without content.
    """
    kinds = list(COPIES.values())

    def original(n: int) -> Image.Image:
        return real[n // 20] if n % 20 == 3 and n // 20 < len(real) else photo(n, 320, 240)

    def sample(n: int) -> tuple[str, dict[str, str], bytes]:
        words = f"{CAPTIONS[n % len(CAPTIONS)]} {n}"
        if n % 20 in (13, 17):
            copied = original(n - n % 20 + (1 if n % 20 == 13 else 3))
            return f"{n:09d}", {"caption": words}, jpeg(kinds[n // 20 % len(kinds)](copied, n), 80)
        if n % 20 == 18:
            return f"{n:09d}", {"caption": words}, jpeg(photo(n, 48, 48))
        return f"{n:09d}", {"caption": "IMG_2034.JPG" if n % 20 == 19 else words}, jpeg(original(n))

    for tar, start in enumerate(range(0, number, 1000)):
        path = folder / f"{tar:05d}.tar"
        if not path.exists():
            write_shard(path, (sample(n) for n in range(start, min(start + 1000, number))))


def builds(options: Options, real: Sequence[Image.Image]) -> dict[int, dict[str, float]]:
    """Return the seconds and rows a second of whole builds by 1 and 2 ranks, start included.

    Builds that were there already are continued, and have no time. Raises RuntimeError if one fails.
    """
    root = Path(options.folder)
    write_downloads(root / "downloads", options.images, real)
    found = {}
    for ranks in (1, 2):
        mpirun = [str(Path(sys.executable).parent / "mpirun"), "-n", str(ranks)] if ranks > 1 else []
        command = [*mpirun, sys.executable, "-m", "data.corpus.build", f"folder={root / str(ranks)}"]
        words = [f"inputs.web.path={root / 'downloads'}", "language.engines=[fasttext]", "questions=rules"]
        start = time.perf_counter()
        done = subprocess.run([*command, *words, "rules=[pii,adult_words]"], capture_output=True, encoding="utf-8")
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        seconds = time.perf_counter() - start
        print(done.stdout, flush=True)
        found[ranks] = {"seconds": round(seconds, 1), "rows a second": round(options.images / seconds, 1)}
    return found


def main(words: Sequence[str]) -> None:
    """Print the results as JSON."""
    options = parse(words, Options)
    real = tiles(options.photographs) if options.photographs else []
    if "copies" in options.parts:
        kinds = {"drawn": [photo(seed, 320, 240) for seed in range(options.number)]}
        kinds |= {"photographs": real[:: max(1, len(real) // options.number)][: options.number]} if real else {}
        for name, originals in kinds.items():
            print(json.dumps({f"copies of {name} images, and those found": planted(originals)}, indent=1), flush=True)
    if "steps" in options.parts:
        print(json.dumps({"rows a second and core": steps(options.ocr)}, indent=1), flush=True)
    if "builds" in options.parts:
        small = tiles(options.photographs, 320, 240) if real else []
        print(json.dumps({"builds by ranks": builds(options, small)}, indent=1), flush=True)


if __name__ == "__main__":
    run_command(main)
