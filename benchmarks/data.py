"""Measure the examples that one core reads, beside webdataset, megatron-energon and decoding alone.

    pip install webdataset megatron-energon
    python -m benchmarks.data
    python -m benchmarks.data examples=512 repeats=9

The corpus is made of one photograph, which Matplotlib carries (512 x 600 pixels): crops of it as JPEGs of 40 to 120 kB,
with captions, in four shards. Every side gives images of 224 px by Pillow's bilinear filter, and token ids of the
captions by the same tokenizer. Sides take turns in one process and one thread, and seconds are those of the processor,
so that other work on the machine counts little. A side whose package is not installed is left out.
"""

import importlib.util
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import cbook
from PIL import Image
from rich.console import Console
from rich.table import Table

from common.command_line import run_command, split_own
from data import images
from data.config import ComponentConfig, DataConfig
from data.corpus_text import corpus_texts
from data.error_budget import Ledger
from data.shards.source import ShardSource
from data.shards.writer import write_shard
from data.stream import Stream
from data.tokenizer import Tokenizer, train_tokenizer

SIZE, SHARDS, TOKENS_PER_IMAGE, WARM_UP = 224, 4, 256, 2
TEXT = "a photograph of an officer in uniform with a white hat before a flag in the harbor on a clear morning"


@dataclass
class Options:
    """Measure the examples that one core reads."""

    examples: int = 256
    """Examples of a timed step."""
    repeats: int = 7
    """Timed steps of each side, after two to warm up."""


def make_corpus(folder: Path, examples: int) -> float:
    """Write shards and a tokenizer; return the mean bytes of an image."""
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=True)) as opened:
        photograph = opened.convert("RGB")
    rng, samples = np.random.default_rng(0), []
    for number in range(examples):
        left, top = rng.integers(0, 24, 2).tolist()
        content = io.BytesIO()
        crop = photograph.crop((left, top, photograph.width - 23 + left, photograph.height - 23 + top))
        crop.save(content, "JPEG", quality=int(rng.integers(80, 96)))
        caption = " ".join(rng.choice(TEXT.split(), int(rng.integers(5, 25))))
        samples.append((f"{number:09d}", {"alt_text": caption, "language": "en"}, content.getvalue()))
    for shard in range(SHARDS):
        write_shard(folder / "photographs" / f"train-{shard:05d}.tar", samples[shard::SHARDS])
    train_tokenizer(corpus_texts(folder), folder / "tokenizer.model", 1000)
    return statistics.mean(len(content) for _, _, content in samples)


def decoding(folder: str, examples: int, scaled: bool) -> Callable[[], None]:
    """Decode images that are in memory: the bound of every side."""
    source = ShardSource("photographs", f"{folder}/photographs", "train", Ledger(1, 1))
    contents = [source.image(number) for number in range(examples)]

    def step() -> float:
        for content in contents:
            assert content is not None
            images.decode(content, SIZE, scaled=scaled)

    return step


def ours(folder: str, examples: int, scaled: bool) -> Callable[[], None]:
    """Read a step of `examples`: shuffled over the whole corpus, split-captioning, packed into rows."""
    data = DataConfig(
        root=folder, tokenizer=f"{folder}/tokenizer.model", global_batch_size=examples, num_streams=1,
        pool_examples=examples, encoder_length=4688, decoder_length=400, target_length=320, images_per_row=17,
        num_threads=1, scaled_decoding=scaled,
    )  # fmt: skip
    mixture = {"photographs": ComponentConfig("photographs", "split_captioning", 1.0, {})}
    stream = Stream(data, mixture, Tokenizer(data.tokenizer), SIZE, TOKENS_PER_IMAGE, "train", 0)
    steps = iter(range(1, 1_000_000))

    def step() -> float:
        assert len(stream.rows(next(steps), range(1))[1]) == examples

    return step


def _encoded(image: Image.Image, caption: str, tokenizer: Tokenizer) -> tuple[np.ndarray, list[int]]:
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)), tokenizer.encode(caption)


def webdataset(folder: str, examples: int) -> Callable[[], None]:
    """Read the shards in order by webdataset, as its documentation does with Pillow; nothing is packed."""
    import webdataset as wds  # type: ignore[import-not-found, unused-ignore]

    tokenizer = Tokenizer(f"{folder}/tokenizer.model")
    shards = sorted(map(str, Path(folder, "photographs").glob("*.tar")))
    dataset = wds.WebDataset(shards, shardshuffle=False).repeat()
    dataset = dataset.shuffle(100).decode("pilrgb").to_tuple("jpg", "json")
    return _taking(iter(dataset.map(lambda pair: _encoded(pair[0], pair[1]["alt_text"], tokenizer))), examples)


def prepare_energon(folder: str) -> None:
    """Make energon's own index."""
    from megatron.energon.epathlib import EPath  # type: ignore[import-not-found, unused-ignore]
    from megatron.energon.flavors import BaseWebdatasetFactory  # type: ignore[import-not-found, unused-ignore]

    own = Path(folder, "photographs")
    shards = sorted(path.name for path in own.glob("*.tar"))
    BaseWebdatasetFactory.prepare_dataset(EPath(own), shards, split_parts_ratio=[("train", 1.0)], workers=1)
    (own / ".nv-meta" / "dataset.yaml").write_text(
        "sample_type: {__module__: megatron.energon, __class__: CaptioningSample}\n"
        "field_map: {image: jpg, caption: 'json[alt_text]'}\n",
        encoding="utf-8",
    )


def energon(folder: str, examples: int) -> Callable[[], None]:
    """Read the shards by megatron-energon, with its own index; nothing is packed."""
    from megatron.energon import (  # type: ignore[import-not-found, unused-ignore]
        DefaultTaskEncoder,
        SampleDecoder,
        WorkerConfig,
        get_loader,
        get_train_dataset,
    )

    prepare_energon(folder)
    tokenizer, own = Tokenizer(f"{folder}/tokenizer.model"), Path(folder, "photographs")

    class Encoder(DefaultTaskEncoder):  # type: ignore[misc, unused-ignore]
        decoder = SampleDecoder(image_decode="pilrgb")

        def encode_sample(self, sample: Any) -> Any:
            return _encoded(sample.image, sample.caption, tokenizer)

        def batch(self, samples: list[Any]) -> Any:
            return samples

    workers = WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = get_train_dataset(
        str(own), worker_config=workers, batch_size=1, shuffle_buffer_size=100, max_samples_per_sequence=100,
        task_encoder=Encoder(),
    )  # fmt: skip
    return _taking(iter(get_loader(dataset)), examples)


def _taking(found: Iterator[Any], examples: int) -> Callable[[], None]:
    def step() -> float:
        for _ in range(examples):
            next(found)

    return step


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def main(options: Options, overrides: Sequence[str]) -> None:
    """Print the table."""
    console = Console(width=140)
    with tempfile.TemporaryDirectory(prefix="benchmark_data_") as name:
        size = make_corpus(Path(name), options.examples)
        arguments = (name, options.examples)
        sides = {
            "decoding alone": decoding(*arguments, False),
            "this system": ours(*arguments, False),
            "decoding alone, scaled": decoding(*arguments, True),
            "this system, data.scaled_decoding=true": ours(*arguments, True),
        }
        for package, make in (("webdataset", webdataset), ("megatron.energon", energon)):
            if _installed(package):
                sides[package] = make(*arguments)
            else:
                console.print(f"{package} is not installed; it is left out.")
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(WARM_UP + options.repeats):
            for side in sides if turn % 2 else reversed(sides):
                began = time.process_time()
                sides[side]()
                if turn >= WARM_UP:
                    seconds[side].append(time.process_time() - began)
    table = Table(
        title=f"one core, {options.examples} examples a step, images of {size / 1e3:.0f} kB to {SIZE} px, medians of "
        f"{options.repeats} (spread)"
    )
    for column in ("side", "examples/s of processor time", "of decoding alone"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for side, taken in seconds.items():
        speeds = sorted(options.examples / second for second in taken)
        ratio = statistics.median(alone / own for alone, own in zip(seconds["decoding alone"], taken, strict=True))
        table.add_row(side, f"{statistics.median(speeds):.0f} ({speeds[0]:.0f} to {speeds[-1]:.0f})", f"{ratio:.0%}")
    console.print(table)


if __name__ == "__main__":
    run_command(lambda words: main(*split_own(words, Options)))
