"""One step's data as the engine takes it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from common.errors import ReadingStopped
from data.examples import ExampleInfo
from data.objectives import NAMES
from data.packing import Rows
from data.stream import Statistics
from model.batch import MicroBatch
from train.config import RunConfig
from train.step.reader import Reading
from train.step.reduction import Agreement, Local

Trim = Callable[[MicroBatch], MicroBatch]


@dataclass
class Share:
    """One rank's share of a step as it is computed, and the seconds that this rank waited for data.

    `empty`: a micro-batch without an example, for when another rank has more of them.
    """

    micro_batches: list[MicroBatch]
    empty: MicroBatch
    infos: list[ExampleInfo]
    statistics: Statistics
    data_wait_s: float = 0.0

    @classmethod
    def of(cls, reading: Reading, trim: Trim) -> "Share":
        """From what a reader gives: at least one micro-batch of rows."""
        whole = [as_tensors(rows) for rows in reading.rows]
        batches, empty = [trim(batch) for batch in whole], trim(whole[0].emptied())
        return cls(batches, empty, reading.infos, reading.statistics, reading.data_wait_s)

    def facts(self, tokens_per_image: int, components: Sequence[str] = ()) -> Local:
        """What the other ranks must know of it; `components`: names of the mixture's."""
        examples = Counter(info.objective for info in self.infos)
        by_component = Counter(info.component for info in self.infos)
        return Local(
            num_micro_batches=len(self.micro_batches),
            num_targets=sum(batch.num_targets for batch in self.micro_batches),
            encoder_tokens=sum(int((batch.encoder_segments > 0).sum()) for batch in self.micro_batches),
            images=sum(int((batch.visual_index >= 0).sum()) for batch in self.micro_batches) // tokens_per_image,
            examples=[examples[name] for name in NAMES],
            components=[by_component[name] for name in components],
            positions=sum(batch.num_positions for batch in self.micro_batches),
            empty_positions=self.empty.num_positions,
            truncated=self.statistics.truncated,
            skipped=self.statistics.skipped,
            data_wait_s=self.data_wait_s,
        )

    def filled(self, number: int) -> list[MicroBatch]:
        """The micro-batches, filled up with empty ones to `number`."""
        return self.micro_batches + [self.empty] * (number - len(self.micro_batches))


def read_or_stop(read: Callable[[], Share], agreement: Agreement) -> Share:
    """What `read` gives, before all ranks agree on it.

    Where it raises ReadingStopped, the other ranks learn so as they agree, and raise it too.
    """
    try:
        return read()
    except ReadingStopped as error:
        agreement.agree(Local(stopped=error))
        raise


def as_tensors(rows: Rows) -> MicroBatch:
    """Packed rows as the model takes them, on the host."""
    return MicroBatch.from_rows(cast(Mapping[str, np.ndarray], rows))


def joiner(config: RunConfig, device: torch.device) -> Trim:
    """What joins a micro-batch's rows into one without padding, to train and validate on: on a CPU, where attention
    takes it apart into examples. Elsewhere, and with dropout, whose masks are drawn per row, what `trimmer` gives.
    """
    trim, multiple = trimmer(config), config.data.trim_multiple
    if multiple == 0 or config.parallel.pipeline > 1 or config.model.dropout_rate or device.type != "cpu":
        return trim
    return lambda batch: trim(batch).joined(multiple)


def trimmer(config: RunConfig) -> Trim:
    """What leaves out what no row of a micro-batch uses (`data.trim_multiple`); `config` as the phase sees it."""
    multiple, tokens_per_image = config.data.trim_multiple, config.vit.num_tokens(config.model.image_size)
    if multiple == 0 or config.parallel.pipeline > 1:
        return lambda batch: batch
    return lambda batch: batch.trimmed(tokens_per_image, multiple)


def identities(infos: Sequence[ExampleInfo]) -> list[dict[str, Any]]:
    """What finds the examples again: source, objective, shard and key, and the beginnings of the texts."""
    names, texts = ("source", "objective", "shard", "key", "language"), ("input_text", "target_text")
    return [
        {name: getattr(info, name) for name in names} | {name: shortened(getattr(info, name)) for name in texts}
        for info in infos
    ]


def shortened(text: str, most: int = 200) -> str:
    """The beginning of a text, with the number of letters that are left out."""
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most} more characters)"


def seed_generators(seed: int, step: int, data_parallel_rank: int) -> None:
    """Torch's random state is a function of the step: a resumed run draws what the interrupted one would have."""
    mixed = np.random.SeedSequence([seed, step, data_parallel_rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(mixed[0]))
