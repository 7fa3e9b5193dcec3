"""Report images and texts of evaluation sets that are in a training corpus.

    python -m data.overlap train=corpus/webli test=downloads/coco/val2014
    python -m data.overlap train='corpus/*/train-*.tar' test=questions.jsonl output=leaks.jsonl

Exit code 3 if there are any. Both may be a folder or pattern of tars, a folder of image files, or JSON Lines of texts.
Images are compared by perceptual hashes, as crops and mirror images too; texts by the shingles of five words.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.command_line import parse, run_command
from common.errors import EXIT_STOPPED, ConfigurationError
from common.files import write_text
from common.values import PATH, at_least, at_most
from data.corpus.card.counts import texts
from data.corpus.config import DuplicateConfig, ImageConfig
from data.corpus.inputs.evaluation import open_evaluation
from data.corpus.row import Reader
from data.corpus.steps import features, hashes, images, neighbors
from data.corpus.steps.hashes import ENTRY, FEATURE, IMAGE, TEXT, Entries, text_distance
from data.objectives.split_captioning import word_starts
from data.skip import Skip, one_record

SHOWN = 10  # matches that are printed
BATCH = 2_000  # samples of the training corpus that are compared at a time


@dataclass
class OverlapConfig:
    """Options of this command."""

    train: str = field(default="", metadata=PATH)
    """Training corpus: a folder or pattern of tars, such as 'corpus/*/train-*.tar'. Required."""
    test: str = field(default="", metadata=PATH)
    """Evaluation set: a folder of images, tars, or JSON Lines of texts. Required."""
    output: str | None = field(default=None, metadata=PATH)
    """JSON Lines file of all matches. Null by default: the first ones are printed."""
    min_words: int = 6
    """Words of a text, at least; shorter ones are alike by chance. 6 by default."""
    image_distance: int = 31
    """Bits of 256 by which images differ at most, as in duplicates.image_distance."""
    text_similarity: float = 0.8
    """Jaccard similarity of texts, at least, as in duplicates.text_similarity."""

    def __post_init__(self) -> None:
        at_least("", 1, min_words=self.min_words)
        at_least("", 0, image_distance=self.image_distance, text_similarity=self.text_similarity)
        at_most("", 1, text_similarity=self.text_similarity)


class Sample(NamedTuple):
    """Hold an image, texts, or both, with an id."""

    id: str
    image: bytes | None = None
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Match:
    """Name two samples that are nearly the same: `kind` is image or text.

    `distance`: bits of 256 that differ; None for images that share a part, such as a crop.
    """

    kind: str
    train: str
    test: str
    distance: int | None


def overlap(train: Iterable[Sample], test: Sequence[Sample], config: OverlapConfig) -> list[Match]:
    """Return a match for each training sample that is nearly one of the evaluation set.

    A pure function; memory is that of the evaluation set's hashes and of one batch of the training samples.
    """
    tested = _entries(test, 0, config)
    found: list[Match] = []
    for batch in _batches(train):
        every = np.concatenate([tested, _entries(batch, len(test), config)])
        distances = {IMAGE: config.image_distance, TEXT: text_distance(config.text_similarity)}
        for name, kinds in (("image", (IMAGE, FEATURE)), ("text", (TEXT,))):
            own_kinds = every[np.isin(every["kind"], kinds)]
            for edge in neighbors.settled(neighbors.edges(own_kinds, distances, len(test), 1)):
                if edge["other"] < len(test):
                    own = batch[int(edge["row"]) - len(test)]
                    distance = None if edge["cause"] == neighbors.PART else int(edge["distance"])
                    found.append(Match(name, own.id, test[int(edge["other"])].id, distance))
    return found


def samples(reader: Reader, skipped: Counter[str]) -> Iterator[Sample]:
    """Yield the samples of an evaluation set or corpus; those that cannot be read are counted."""
    for part in reader.parts():
        for row in reader.rows(part, skipped):
            try:
                with one_record("the row"):
                    if row.cause is not None:
                        raise Skip(row.cause)
                    yield Sample(row.id, row.image(), tuple(text for _, _, text in texts(row.fields)))
            except Skip as skip:
                skipped[skip.cause] += 1


def _entries(given: Sequence[Sample], first: int, config: OverlapConfig) -> Entries:
    """Return the entries of samples; training samples are compared with those of evaluation sets alone."""
    flags = hashes.CURATED if first else 0
    made = [np.zeros(0, ENTRY)]
    for row, sample in enumerate(given, first):
        if sample.image is not None:
            try:
                pixels = images.look(sample.image, ImageConfig(), curated=True).pixels
            except Skip:
                continue
            made += features.compared("", row, pixels, DuplicateConfig(), flags)
        for text in dict.fromkeys(sample.texts):
            if len(word_starts(text)) >= config.min_words:
                made += hashes.text_entries("", row, text, flags)
    return np.concatenate(made)


def _batches(given: Iterable[Sample]) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for sample in given:
        batch.append(sample)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def main(words: Sequence[str]) -> None:
    """Print the matches and their numbers; exit with code 3 if there are any."""
    config = parse(words, OverlapConfig)
    skipped: Counter[str] = Counter()
    test = list(samples(open_evaluation("test", config.test), skipped))
    if not test:
        raise ConfigurationError(f"test={config.test} holds nothing that can be read; name an evaluation set.")
    number = 0

    def counted() -> Iterator[Sample]:
        nonlocal number
        for sample in samples(open_evaluation("train", config.train), skipped):
            number += 1
            yield sample

    found = overlap(counted(), test, config)
    if config.output:
        write_text(Path(config.output), "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in found))
    for one in found[:SHOWN]:
        how = "they share a part" if one.distance is None else f"{one.distance} of 256 bits differ"
        print(f"{one.kind}: {one.train} is {one.test} of the evaluation set ({how})")
    for cause, times in skipped.most_common():
        print(f"not compared: {times:,} x {cause}")
    kinds = Counter(one.kind for one in found)
    print(f"{kinds['image']:,} images and {kinds['text']:,} texts of {number:,} records are in {config.test}")
    if found:
        print(f"train={config.train} holds records of test={config.test}; build it without them.", file=sys.stderr)
        sys.exit(EXIT_STOPPED)


if __name__ == "__main__":
    run_command(main)
