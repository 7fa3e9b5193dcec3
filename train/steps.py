"""One step's data as the engine takes it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch

from data.examples import ExampleInfo
from data.objectives import NAMES
from data.packing import Rows, empty_micro_batch
from model.batch import MicroBatch
from train.agreement import Local
from train.config import RunConfig

Trim = Callable[[MicroBatch], MicroBatch]


@dataclass
class Share:
    """One rank's share of a step."""

    rows: list[Rows]
    infos: list[ExampleInfo]
    skipped: dict[str, int]

    def facts(self, tokens_per_image: int) -> Local:
        """What the other ranks must know of it."""
        examples = Counter(info.objective for info in self.infos)
        return Local(
            num_micro_batches=len(self.rows),
            num_targets=sum(int(np.count_nonzero(rows["decoder_segments"])) for rows in self.rows),
            encoder_tokens=sum(int(np.count_nonzero(rows["encoder_segments"])) for rows in self.rows),
            images=sum(int(np.count_nonzero(rows["visual_index"] >= 0)) for rows in self.rows) // tokens_per_image,
            examples=[examples[name] for name in NAMES],
            skipped=self.skipped,
        )

    def micro_batches(self, number: int, trim: Trim) -> list[MicroBatch]:
        """The rows as tensors, filled up with empty micro-batches to `number`."""
        rows = self.rows + [empty_micro_batch(self.rows[0])] * (number - len(self.rows))
        return [trim(as_tensors(each)) for each in rows]

    @property
    def positions(self) -> int:
        """Encoder and decoder positions of one micro-batch, padding included."""
        return self.rows[0]["encoder_segments"].size + self.rows[0]["decoder_segments"].size


def as_tensors(rows: Rows) -> MicroBatch:
    """Packed rows as the model takes them, on the host."""
    return MicroBatch.from_rows(cast(Mapping[str, np.ndarray], rows))


def trimmer(config: RunConfig) -> Trim:
    """What leaves out what no example of a micro-batch uses (`data.trim_multiple`); `config` as the phase sees it."""
    multiple, tokens_per_image = config.data.trim_multiple, config.vit.num_tokens(config.model.image_size)
    if multiple == 0 or config.parallel.pipeline > 1:
        return lambda batch: batch
    return lambda batch: batch.trimmed(tokens_per_image, multiple)


def identities(infos: Sequence[ExampleInfo]) -> list[dict[str, Any]]:
    """What finds the examples again: source, objective, shard and key, and the texts."""
    names = ("source", "objective", "shard", "key", "language", "input_text", "target_text")
    return [{name: value for name, value in asdict(info).items() if name in names} for info in infos]


def seed_generators(seed: int, step: int, data_parallel_rank: int) -> None:
    """Torch's random state is a function of the step: a resumed run draws what the interrupted one would have."""
    mixed = np.random.SeedSequence([seed, step, data_parallel_rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(mixed[0]))
