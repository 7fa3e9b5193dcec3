"""Prints one SHA-256 per step of the global batch: the same for any number of data-parallel ranks.

    python -m data.digest mixture=miniature steps=1:21 data_parallel_size=4

`steps`, `data_parallel_size` and `split` are this program's own; all else overrides the run's configuration
(conf/pretrain.yaml), of which `data`, `mixture`, `run.seed`, and the first phase's image size are used.
"""

import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import ConfigurationError, ReadingStopped, StorageFailed
from common.overrides import as_typed, check_choices, check_read, open_names, stored_schema
from common.terminal import use_utf8
from common.values import at_least, in_one_line, typed
from data.config import DataConfig, MixtureConfig
from data.error_budget import NothingUsable
from data.packing import Rows, RowShape, take
from data.shards.source import SPLITS
from data.stream import Stream
from data.tokenizer import Tokenizer

CONFIGURATION = Path(__file__).parent.parent / "conf"
SCHEMA = "run_schema"
OF_NOTHING = hashlib.sha256(b"").hexdigest()  # the digest of a step without any row
TEXT = {"data.": DataConfig, "mixture.": MixtureConfig}
READS = ("data", "mixture", "stage", "vit", "run.seed", "model=", "experiment=")


@dataclass
class Numbers:
    """The numbers of other groups that decide what a batch holds."""

    image_size: int
    patch_size: int
    seed: int

    def __post_init__(self) -> None:
        at_least("", 1, image_size=self.image_size, patch_size=self.patch_size)
        at_least("run.", 0, seed=self.seed)


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
    """The stream of a run's configuration with these overrides."""
    try:
        check_choices(overrides, CONFIGURATION)
        with stored_schema(SCHEMA, {"run": {"seed": 0}}), initialize_config_dir(str(CONFIGURATION), version_base=None):
            config = compose("pretrain", open_names(as_typed(overrides, TEXT), TEXT))
        mixture = typed(MixtureConfig, OmegaConf.to_container(config.mixture, resolve=True), "mixture")
        if not config.stage.phases:
            raise ConfigurationError("stage.phases is empty; give at least one phase (see conf/stage).")
        for name in ("global_batch_size", "encoder_length", "decoder_length"):
            config.data[name] = config.stage.phases[0].get(name) or config.data[name]
        data = typed(DataConfig, OmegaConf.to_container(config.data, resolve=True), "data")
        image_size, patch_size, seed = config.stage.phases[0].image_size, config.vit.patch_size, config.run.seed
        read = typed(Numbers, {"image_size": image_size, "patch_size": patch_size, "seed": seed})
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigurationError(in_one_line(error)) from error
    tokens = (read.image_size // read.patch_size) ** 2
    return Stream(data, mixture, Tokenizer(data.tokenizer), read.image_size, tokens, split, read.seed)


def main(arguments: Sequence[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    own = {"steps": "1:2", "data_parallel_size": "1", "split": "train"}
    overrides = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in own:
            own[key] = value
        else:
            overrides.append(argument)
    steps = re.fullmatch(r"(\d+):(\d+)", own["steps"])
    if steps is None or not 1 <= int(steps[1]) < int(steps[2]):
        raise ConfigurationError(
            f"steps={own['steps']} must be first:end, such as 1:21 for steps 1 to 20, with first at least 1."
        )
    if not own["data_parallel_size"].isdecimal() or int(own["data_parallel_size"]) < 1:
        raise ConfigurationError(f"data_parallel_size={own['data_parallel_size']} must be a number, at least 1.")
    if own["split"] not in SPLITS:
        raise ConfigurationError(f"split={own['split']} is unknown; choose one of {', '.join(SPLITS)}.")
    check_read(overrides, READS, "data.digest")
    stream = open_stream(overrides, own["split"])
    digests = []
    for step in range(int(steps[1]), int(steps[2])):
        digests.append(step_digest(stream, step, int(own["data_parallel_size"])))
        print(step, digests[-1], flush=True)
    if set(digests) == {OF_NOTHING}:
        counted = ", ".join(f"{count} x {cause}" for cause, count in sorted(stream.ledger.drain().items()))
        raise NothingUsable(f"steps={own['steps']} of the {own['split']} split hold no example ({counted}).")


if __name__ == "__main__":
    use_utf8()
    try:
        main(sys.argv[1:])
    except ConfigurationError as error:
        print(f"Configuration: {error}", file=sys.stderr)
        sys.exit(2)
    except ReadingStopped as error:
        print(error, file=sys.stderr)
        sys.exit(75 if isinstance(error, StorageFailed) else 3)  # as of a run (train/entry.py)
