"""Mutate shards: members, names, records and bytes of small tars, read through index, mixture and packing."""

import gzip
import io
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ConfigurationError, StorageFailed
from data.config import ComponentConfig, DataConfig, Mixture
from data.error_budget import ErrorBudgetExceeded
from data.packing import Rows
from data.shards.scan import scan
from data.stream import Stream, evaluation_batches
from data.tokenizer import Tokenizer
from tests.fuzz.values import EXTENSIONS, NAMES, flipped, mutated, pick, to_json
from tests.unit.data.conftest import COMPONENTS, IMAGE_SIZE, TOKENS_PER_IMAGE, png, record

OURS = (ConfigurationError, ErrorBudgetExceeded, StorageFailed)
SAMPLES = 12  # per shard
IMAGES = [png(number) for number in range(4)]
Member = tuple[str, bytes, bytes]  # name, content, type of the tar's member


def members(rng: np.random.Generator) -> list[Member]:
    """Draw the members of one shard: whole samples, with some records and images changed."""
    changes = int(rng.integers(0, 4))
    odd_ones = set(rng.integers(0, SAMPLES, changes).tolist())
    found: list[Member] = []
    for number in range(SAMPLES):
        fields: Any = record(number)
        image, key = IMAGES[number % len(IMAGES)], f"{number:05d}"
        content = to_json(fields)
        if number in odd_ones:
            for _ in range(int(rng.integers(1, 4))):
                fields = mutated(rng, fields)
            content = to_json(fields)
            if rng.random() < 0.2:
                content = flipped(rng, content)
            if rng.random() < 0.3:
                image = flipped(rng, image)
        found += [(f"{key}.png", image, tarfile.REGTYPE), (f"{key}.json", content, tarfile.REGTYPE)]
        if rng.random() < 0.1:
            found.append((f"{key}.txt", flipped(rng, "words beside it ✓".encode()), tarfile.REGTYPE))
    return found


def rearranged(rng: np.random.Generator, found: list[Member]) -> list[Member]:
    """Change names, order, number and types of a shard's members."""
    found = list(found)
    for _ in range(int(rng.integers(0, 3))):
        place = int(rng.integers(len(found)))
        name, content, type_ = found[place]
        kind = rng.random()
        if kind < 0.3:
            found[place] = (f"{pick(rng, NAMES)}{pick(rng, EXTENSIONS)}", content, type_)
        elif kind < 0.45:
            found.insert(int(rng.integers(len(found))), (name, content, type_))
        elif kind < 0.6:
            found.insert(int(rng.integers(len(found))), (pick(rng, NAMES) + pick(rng, EXTENSIONS), content, type_))
        elif kind < 0.7 and len(found) > 1:
            del found[place]
        elif kind < 0.8:
            found[place] = (name, b"", type_)
        else:
            odd_types = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE)
            found[place] = (name, b"", pick(rng, odd_types))
    if rng.random() < 0.1:
        found.sort(key=lambda member: (member[0].rpartition(".")[2], member[0]))  # all images first
    if rng.random() < 0.05:
        found = [found[int(place)] for place in rng.permutation(len(found))]
    return found


def as_tar(found: list[Member], form: int) -> bytes:
    """Write members as a tar; a name that the form cannot hold is left out."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as opened:
        for name, content, type_ in found:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), type_, "00000.png"
            try:
                opened.addfile(info, io.BytesIO(content) if info.isreg() else None)
            except (ValueError, UnicodeError):
                continue
    return out.getvalue()


def write_source(rng: np.random.Generator, folder: Path) -> None:
    """Write a source of one or two shards, some of them damaged as files."""
    folder.mkdir(parents=True)
    for shard in range(int(rng.integers(1, 3))):
        found = members(rng)
        if rng.random() < 0.5:
            found = rearranged(rng, found)
        content = as_tar(found, pick(rng, (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)))
        kind = rng.random()
        if kind < 0.2:
            content = flipped(rng, content, 30)
        elif kind < 0.23:
            content = gzip.compress(content)
        elif kind < 0.26:
            content = pick(rng, (b"", b"\x00" * 512, b"\x00" * 10240, b"<html>404</html>", content + b"rest"))
        (folder / f"train-{shard:05d}.tar").write_bytes(content)
    if rng.random() < 0.1:
        beside = folder / "train.index"
        beside.write_bytes(pick(rng, (b"", b"PK\x03\x04", bytes(rng.integers(0, 256, 300, np.uint8)))))


def run(rng: np.random.Generator, folder: Path, tokenizer: Path) -> str:
    """Read one mutated source in every way that a run does; return how it ended.

    Raises AssertionError where a count does not add up, or the error is none of `OURS`.
    """
    write_source(rng, folder / "source")
    for path in sorted((folder / "source").glob("*.tar")):
        check_members(path)
    data = DataConfig(
        root=str(folder), tokenizer=str(tokenizer), global_batch_size=16, num_streams=2, encoder_length=96,
        decoder_length=64, images_per_row=3, num_threads=1, prefetch=0,
    )  # fmt: skip
    mixture = {objective: ComponentConfig("source", objective, weight) for _, objective, weight in COMPONENTS}
    words = Tokenizer(data.tokenizer)
    try:
        stream = Stream(data, mixture, words, IMAGE_SIZE, TOKENS_PER_IMAGE, "train", seed=3)
        for step in (1, 2, 3):
            rows, infos = stream.rows(step, range(2))
            check_rows(rows, len(infos), words.vocab_size)
        for batch in evaluation_batches(stream, 4, limit=4):
            check_rows(batch.micro_batches[0], None, words.vocab_size)
    except OURS as error:
        check_sentence(str(error))
        ended = type(error).__name__
    else:
        ended = "read"
    if ended != "ConfigurationError":  # raised on opening -> there is nothing to count
        check_counts(data, mixture, words)
    return ended


def check_members(path: Path) -> None:
    """Check that each member of a tar lies in a sample, or is left out for one cause."""
    found = scan(str(path))
    assert int((found.spans[:, :, 1] >= 0).sum()) + sum(found.left_out.values()) == found.members, path
    assert len(set(found.keys)) == len(found.keys), path


def check_rows(rows: Rows, num_examples: int | None, vocab_size: int) -> None:
    """Check that every id is in the vocabulary, and that there are as many segments as examples."""
    for name in ("encoder_tokens", "decoder_tokens", "decoder_targets"):
        ids = rows[name]  # type: ignore[literal-required]
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < vocab_size), name
    if num_examples is not None:
        segments = rows["decoder_segments"]
        assert sum(int(row.max(initial=0)) for row in segments) == num_examples


def check_counts(data: DataConfig, mixture: Mixture, words: Tokenizer) -> None:
    """Check that each record of each component is an example, or is counted once under one cause."""
    whole = DataConfig(**{**vars(data), "error_budget": 1.0})
    stream = Stream(whole, mixture, words, IMAGE_SIZE, TOKENS_PER_IMAGE, "train", seed=3)
    stream.ledger.drain()  # drop the counts of opening
    made: Counter[str] = Counter()
    for component in stream.components:
        for number in range(len(component.source)):
            example = component.example(number, np.random.default_rng(number))
            made["example" if example is not None else "counted"] += 1
    counted = sum(stream.ledger.drain().values())
    records = sum(len(component.source) for component in stream.components)
    assert made.total() == records and made["counted"] == counted, (made, counted, records)


def check_sentence(text: str) -> None:
    """Check that the message of an exception is one line of bounded length."""
    assert text.strip() and "\n" not in text and len(text) < 2000, text
