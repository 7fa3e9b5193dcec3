"""Encode text as the labels in it, for a ViT that is pretrained as a classifier; collect the labels of a source.

    python -m data.labels root=runs/corpus source=objects
    python -m data.labels root=/data/shards source=cc3m texts=captions most=20000 fewest=10
    python -m data.labels root=/data/shards source=photos texts=objects words=false output=classes.txt

A list of labels is a text file with one label a line, in any language; line k (from 0) is class k. It takes the
tokenizer's place, so that an objective gives label sets: `labels` those in an image's fields, `task` the class of an
item, `detection` labels with their boxes.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.errors import ConfigurationError
from common.files import write_text, writes
from common.values import PATH, at_least, one_of
from data.error_budget import Ledger
from data.objectives.detection import NUM_BINS
from data.objectives.labels import READERS
from data.shards.source import SPLITS, ShardSource
from data.skip import Skip, one_record
from data.storage import read_file
from data.tokenizer import EOS, Tokenizer

FIRST = EOS + 2  # pad, EOS and unknown come before, as in a tokenizer
COORDINATES = NUM_BINS  # numbers that are ids of their own, behind the labels: coordinates of boxes
SUFFIX = ".txt"  # of a file that is a list of labels, and no tokenizer

_WORD = re.compile(r"\w+")
_COORDINATE = re.compile(r"[0-9]{1,3}")


class Labels(Tokenizer):
    """Convert a text to the ids of the labels in it: whole words, whatever their case, the longest label first.

    Label k has id 3 + k. A number below 1000 that is no label has id 3 + labels + number. Raises ConfigurationError for
    a file that does not exist or is empty, and for two labels that are equal but for case and punctuation.
    """

    has_ids_of_any_text = False

    def __init__(self, path: str | Path) -> None:
        self.path, key = str(path), f"data.tokenizer={path}"
        try:
            self.names = [line for line in read_file(self.path).decode().splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"{key} is no readable list of labels ({error}); write one label a line, or collect them "
                "(python -m data.labels root=<corpus> source=<source>)."
            ) from error
        self.numbers: dict[str, int] = {}
        for number, name in enumerate(self.names):
            words = " ".join(split_words(name))
            if not words or words in self.numbers:
                what = f"is {self.names[self.numbers[words]]!r} again" if words else "has no word"
                raise ConfigurationError(f"{key}: label {number}, {name!r}, {what}; remove or reword it.")
            self.numbers[words] = number
        if not self.names:
            raise ConfigurationError(f"{key} holds no label; write one a line.")
        self.longest = max(words.count(" ") for words in self.numbers) + 1
        self.vocab_size = FIRST + len(self.names) + COORDINATES

    def pieces(self) -> list[str]:
        """Return the labels in order of their ids."""
        return self.names

    def encode(self, text: str) -> list[int]:
        """Return the ids of the labels, and of the numbers below 1000, in their order in a text."""
        words, found, at = split_words(text), [], 0
        while at < len(words):
            lengths = range(min(self.longest, len(words) - at), 0, -1)
            names = ((length, self.numbers.get(" ".join(words[at : at + length]))) for length in lengths)
            length, label = next(((n, label) for n, label in names if label is not None), (1, None))
            if label is not None:
                found.append(FIRST + label)
            elif _COORDINATE.fullmatch(words[at]):
                found.append(FIRST + len(self.names) + int(words[at]))
            at += length
        return found

    def encode_input(self, text: str, closed: bool) -> list[int]:
        """Return no ids: a classifier reads no prompt."""
        return []

    def decode(self, ids: Sequence[int]) -> str:
        """Return the labels, and the numbers, of the ids before the first EOS."""
        kept = [int(i) - FIRST for i in ids[: [*ids, EOS].index(EOS)] if i >= FIRST]
        every = len(self.names)
        return " ".join(self.names[k] if k < every else str(k - every) for k in kept)


def split_words(text: str) -> list[str]:
    """Return the words of a text, without case and without variants of characters (NFKC)."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def open_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer, or the list of labels in a `.txt` file."""
    return Labels(path) if str(path).endswith(SUFFIX) else Tokenizer(path)


@dataclass
class Options:
    """Collect the labels of a source."""

    root: str = field(default="runs/corpus", metadata=PATH)
    """Folder of the sources."""
    source: str = "objects"
    """Folder of the source in `root`. The default is the miniature corpus's."""
    texts: str = "objects"
    """Fields of its records, with commas: `objects` (their labels), `captions`, `alt_text`, `ocr`."""
    words: bool = True
    """Take each word as a label; false takes whole texts, as classes are. True by default: captions hold words."""
    most: int = 30_000
    """Labels that are kept, the most frequent. About JFT's 29,593 by default."""
    fewest: int = 1
    """Records that must hold a label. 1 by default; raise it for text of the web, where typing errors are words too."""
    records: int = 1_000_000
    """Records that are read, spread evenly over the source. The default shows what is frequent in any source."""
    split: str = "train"
    """Split that is read."""
    output: str = field(default="${root}/labels.txt", metadata=PATH)
    """File of the labels, most frequent first."""

    def __post_init__(self) -> None:
        for name in self.texts.split(","):
            one_of("texts", name, tuple(READERS))
        one_of("split", self.split, SPLITS)
        at_least("", 1, most=self.most, fewest=self.fewest, records=self.records)


def collect(options: Options) -> list[str]:
    """Return the labels of a source, the most frequent first. Raises ConfigurationError where there are none."""
    ledger = Ledger(0.01, 16)
    source = ShardSource(options.source, str(Path(options.root, options.source)), options.split, ledger)
    counts: Counter[str] = Counter()
    names = options.texts.split(",")
    numbers = np.linspace(0, len(source) - 1, min(options.records, len(source)), dtype=np.int64)
    for number in numbers.tolist():
        try:
            with one_record("its labels"):
                record = source.read(source.numbered(number), image=False)
                fields = [name for name in names if len(names) == 1 or record.fields.get(name) is not None]
                texts = [text for name in fields for text in READERS[name](record.fields, lambda code: True)]
        except Skip as skip:
            if skip.defect:
                place = source.numbered(number)
                ledger.count_defect(source.name, source.shard(place), skip.cause, f"record {source.key(place)!r:.100}")
            continue
        ledger.count_used(source.name)
        own = [split_words(text) for text in texts]
        counts.update(
            {word for words in own for word in words} if options.words else {" ".join(words) for words in own}
        )
    found = sorted((label for label, n in counts.items() if label and n >= options.fewest),
                   key=lambda label: (-counts[label], label))[: options.most]  # fmt: skip
    if not found:
        raise ConfigurationError(f"source={options.source} has no label in texts={options.texts}; name another.")
    return found


def main(arguments: Sequence[str]) -> None:
    """Write the labels of a source to a file (see Options)."""
    from common.command_line import parse

    options = parse(arguments, Options)
    found = collect(options)
    with writes(f"output={options.output}"):
        write_text(Path(options.output), "\n".join(found) + "\n")
    print(f"{options.output}: {len(found)} labels")


if __name__ == "__main__":
    from common.command_line import run_command

    run_command(main)
