"""Print one SHA-256 per step of the global batch: the same for any number of data-parallel ranks.

    python -m data.digest mixture=miniature steps=1:21
    python -m data.digest mixture=miniature steps=1:21 data_parallel_size=4
    python -m data.digest experiment=paper_3b data.root=/data/shards split=validation

Any other argument overrides the run's configuration (conf/pretrain.yaml): `run.seed` and the groups `data`, `mixture`
and `phases` (the first phase counts).
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from common.command_line import PHASES, compose_groups, first_phase, read_words, run_command
from common.errors import ConfigurationError
from common.values import at_least, one_of, replacing, typed
from data.config import ComponentConfig, DataConfig, for_objectives
from data.error_budget import NothingUsable
from data.packing import Rows, RowShape, take
from data.shards.source import SPLITS
from data.stream import Stream
from data.tokenizer import Tokenizer

OF_NOTHING = hashlib.sha256(b"").hexdigest()  # the digest of a step without any row
READS = ("data", "mixture", "phases", "vit", "run.seed", "model=", "experiment=")
PHASE_READS = ("image_size", "objectives", *(one.name for one in fields(DataConfig)))


@dataclass
class DigestConfig:
    """Options of this command."""

    steps: str = "1:2"
    """First step and end, counted from 1 (`1:21` are steps 1 to 20). One step by default: it reads a whole batch."""
    data_parallel_size: int = 1
    """Ranks that the streams are divided among; the digests do not depend on it. 1 is the simplest."""
    split: str = "train"
    """Split of the sources: train, validation or test. Training reads "train"."""

    def __post_init__(self) -> None:
        found = re.fullmatch(r"(\d+):(\d+)", self.steps)
        if found is None or not 1 <= int(found[1]) < int(found[2]):
            raise ConfigurationError(
                f"steps={self.steps} must be first:end, such as 1:21 for steps 1 to 20, with first at least 1."
            )
        at_least("", 1, data_parallel_size=self.data_parallel_size)
        one_of("split", self.split, SPLITS)


@dataclass
class Numbers:
    """The numbers of other groups that decide what a batch holds."""

    image_size: int
    patch_size: int
    seed: int

    def __post_init__(self) -> None:
        at_least("", 1, image_size=self.image_size, patch_size=self.patch_size)
        at_least("run.", 0, seed=self.seed)


@dataclass
class Objectives:
    """The objectives of the phase that is read."""

    objectives: dict[str, float] = field(default_factory=dict)


def step_digest(stream: Stream, step: int, data_parallel_size: int) -> str:
    """SHA-256 (hex) of a step's rows as the ranks read them; where a row lies, and on which rank, does not count."""
    if stream.num_streams % data_parallel_size:
        raise ConfigurationError(
            f"data.num_streams={stream.num_streams} is not a multiple of data_parallel_size={data_parallel_size}."
        )
    share = stream.num_streams // data_parallel_size
    digests = []
    for rank in range(data_parallel_size):
        rows, _ = stream.rows(step, range(rank * share, (rank + 1) * share))
        digests += [row_digest(rows, row, stream.shape) for row in range(len(rows["encoder_tokens"]))]
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def row_digest(rows: Rows, row: int, shape: RowShape) -> bytes:
    """SHA-256 of one row: names, types, shapes and values of all its arrays."""
    digest = hashlib.sha256()
    for name, array in take(rows, row, row + 1, shape).items():
        assert isinstance(array, np.ndarray)
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()


def open_stream(overrides: Sequence[str], split: str) -> Stream:
    """Return the stream that the first phase of a run's configuration with these overrides reads."""
    groups: dict[str, Any] = {"data": DataConfig, "mixture": dict[str, ComponentConfig], "phases": PHASES}
    found = compose_groups(overrides, groups | {"vit": {}, "model": {"image_size": 224}, "run": {"seed": 0}})
    name, phase = first_phase(found["phases"])
    mixture = {key: typed(ComponentConfig, one, f"mixture.{key}") for key, one in found["mixture"].items()}
    narrowed = for_objectives(
        mixture, typed(Objectives, replacing(Objectives, phase), f"phases.{name}").objectives, name
    )
    data = typed(DataConfig, found["data"] | replacing(DataConfig, phase), "data")
    image_size = phase.get("image_size") or found["model"]["image_size"]
    numbers = {"image_size": image_size, "patch_size": found["vit"]["patch_size"], "seed": found["run"]["seed"]}
    read = typed(Numbers, numbers, f"phases.{name}")
    tokens = (read.image_size // read.patch_size) ** 2
    return Stream(data, narrowed, Tokenizer(data.tokenizer), read.image_size, tokens, split, read.seed)


def main(arguments: Sequence[str]) -> None:
    """Print the digests of the steps."""
    own, overrides = read_words(arguments, DigestConfig, "data.digest", READS, PHASE_READS)
    stream = open_stream(overrides, own.split)
    first, end = map(int, own.steps.split(":"))
    digests = []
    for step in range(first, end):
        digests.append(step_digest(stream, step, own.data_parallel_size))
        print(step, digests[-1], flush=True)
    if set(digests) == {OF_NOTHING}:
        counted = ", ".join(f"{count} x {cause}" for cause, count in sorted(stream.ledger.drain().items()))
        raise NothingUsable(f"steps={own.steps} of the {own.split} split hold no example ({counted}).")


if __name__ == "__main__":
    run_command(main)
