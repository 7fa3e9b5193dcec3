"""Make WebDataset shards of a folder of captioned images, and print the command that trains on them.

    python -m examples.own_shards images=photos corpus=runs/own

`photos` holds images, each with a text file of the same name beside it: `dog.jpg` and `dog.txt`. Every tenth image
goes to the validation split.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from common.command_line import parse, run_command
from common.errors import ConfigurationError
from data.corpus_text import corpus_texts
from data.shards.writer import write_shard
from data.tokenizer import train_tokenizer

SOURCE = "own"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
VALIDATION = 10  # every tenth image


@dataclass
class Options:
    """Make WebDataset shards of a folder of captioned images."""

    images: str = MISSING
    """Folder of images, each with a text file of the same name."""
    corpus: str = "runs/own"
    """Folder for the corpus: shards of a source `own`, and a tokenizer."""
    language: str = "en"
    """Language of the captions, as in RFC 5646."""
    vocab_size: int = 512
    """Pieces of the tokenizer that is trained on the captions; for real training use mT5's with 250,112."""


def samples(files: list[Path], language: str) -> Iterator[tuple[str, dict[str, object], bytes]]:
    """Yield (key, record, encoded image) of each file."""
    for file in files:
        caption = file.with_suffix(".txt").read_text(encoding="utf-8").strip()
        yield file.stem.replace(".", "_"), {"captions": {language: caption}}, file.read_bytes()


def main(options: Options) -> None:
    """Write the shards and the tokenizer."""
    files = sorted(path for path in Path(options.images).iterdir() if path.suffix.lower() in SUFFIXES)
    captioned = [path for path in files if path.with_suffix(".txt").is_file()]
    if len(captioned) < 2:
        raise ConfigurationError(f"images={options.images} holds no two images with a .txt beside them; add some.")
    splits = {"validation": captioned[::VALIDATION], "train": [f for i, f in enumerate(captioned) if i % VALIDATION]}
    for split, chosen in splits.items():
        write_shard(Path(options.corpus, SOURCE, f"{split}-00000.tar"), samples(chosen, options.language))
    tokenizer = Path(options.corpus, "tokenizer.model")
    train_tokenizer(corpus_texts(options.corpus, "train"), tokenizer, options.vocab_size)
    print(f"{len(splits['train'])} training and {len(splits['validation'])} validation images in {options.corpus}")
    print(f"python -m train.pretrain mixture=captions data.root={options.corpus} run.name=own")


if __name__ == "__main__":
    run_command(lambda words: main(parse(words, Options)))
