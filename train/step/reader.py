"""A replica, the ranks of one data-parallel rank, reads as one: its first rank reads, and tells the others.

So a picture is fetched and decoded once a replica. Who only read the texts could not know the rows: an unreadable
picture changes them. Token ids are sent to all; pixels to the first pipeline stage, elsewhere pictures have no
channels. The first rank alone keeps the texts, which it writes to files.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist

from common.errors import ConfigurationError, ReadingStopped
from data.config import Mixture
from data.examples import ExampleInfo
from data.packing import Rows
from data.stream import Reader, Statistics, Stream, evaluation_batches, held_out_example
from data.tokenizer import Tokenizer
from parallel.layout import Layout
from train.config import RunConfig
from train.facts import facts_of_all
from train.step.reduction import raise_everywhere


@dataclass
class Reading:
    """Micro-batches of packed rows, their examples, and what was left out of them.

    `data_wait_s`: how long this rank waited for it itself; 0 where another one read.
    """

    rows: list[Rows]
    infos: list[ExampleInfo]
    statistics: Statistics = field(default_factory=lambda: Statistics({}, 0))
    data_wait_s: float = 0.0


class ReplicaReader:
    """One split of a mixture, for every rank of a replica; each read is a collective of the replica.

    Every rank opens the shards, and all raise what one of them raises, or where their shards differ; `facts` are what
    the sources hold. A read raises ReadingStopped on all of the replica where its first rank meets it.
    """

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        tokenizer: Tokenizer,
        mixture: Mixture,
        split: str,
        prefetch: int | None = None,
    ) -> None:
        """`config`: as the phase sees it; `prefetch`: steps to read ahead, else as `config.data` says."""
        self.layout, self.micro_batch_size, self.prefetch = layout, config.parallel.micro_batch_size, prefetch
        self.stream = opened_by_all(partial(open_stream, config, tokenizer, mixture, split))
        self.facts = facts_of_all(self.stream, config, layout, split)
        if layout.data_parallel_rank:
            self.stream.ledger.drain()  # every rank has found the same in opening; one replica tells it

    @cached_property
    def reader(self) -> Reader:
        """Only of the first rank of a replica."""
        rank, size = self.layout.data_parallel_rank, self.layout.data_parallel_size
        return Reader(self.stream, rank, size, self.micro_batch_size, self.prefetch)

    def read(self, step: int) -> Reading:
        """The replica's share of a step."""
        return cast(Reading, read_once(partial(self._step, step), self.layout))

    def held_out(
        self, batch: int, limit: int | None, seed: int = 0, keep: Callable[[ExampleInfo], bool] = lambda info: True
    ) -> Iterator[Reading]:
        """Every component's records in order, as `data.stream.evaluation_batches` gives them: equally many on every
        rank, one example a row."""
        rank, size = self.layout.data_parallel_rank, self.layout.data_parallel_size
        batches = evaluation_batches(self.stream, batch, limit, rank, size, seed, keep)

        def read() -> Reading | None:
            found = next(batches, None)
            return found and Reading([found[0]], found[1])

        while (reading := read_once(read, self.layout)) is not None:
            yield reading

    def picture(self, place: int, limit: int | None, seed: int = 0) -> np.ndarray | None:
        """The picture of a held-out example, uint8 [S, S, 3], read once more; None where that cannot be done."""
        try:
            example = held_out_example(self.stream, place, limit, seed)
        except ReadingStopped:
            return None  # nobody else reads now, and a picture is worth no run
        return example.images[0] if example is not None and len(example.images) else None

    def close(self) -> None:
        """Stops reading ahead."""
        if self.layout.is_replica_leader:
            self.reader.close()

    def _step(self, step: int) -> Reading:
        began = time.perf_counter()
        rows, infos, statistics = self.reader.read(step)
        return Reading(rows, infos, statistics, time.perf_counter() - began)


def read_once(read: Callable[[], Reading | None], layout: Layout) -> Reading | None:
    """What `read` gives on the first rank of a replica, on all of them."""
    if layout.model_group.size() == 1:
        return read()
    found, stopped = None, None
    if layout.is_replica_leader:
        try:
            found = read()
        except ReadingStopped as error:
            stopped = error
    message: list[Any] = [stopped, found and _for_the_others(found)]
    dist.broadcast_object_list(message, group=layout.model_group, group_src=0, device=torch.device("cpu"))
    if message[0] is not None:
        raise message[0]
    reading: Reading | None = found or message[1]
    if reading is not None and layout.pipeline_group.rank() == 0 and layout.tensor_group.size() > 1:
        for rows in reading.rows:  # the first rank of this tensor-parallel group is the replica's
            if not layout.is_replica_leader:
                rows["images"] = np.empty((*rows["images"].shape[:-1], 3), np.uint8)
            dist.broadcast(torch.from_numpy(rows["images"]), group=layout.tensor_group, group_src=0)
    return reading


def _for_the_others(reading: Reading) -> Reading:
    """What a replica's other ranks need: pictures without channels, and examples that are counted but never shown."""
    rows = [cast(Rows, {**each, "images": each["images"][..., :0]}) for each in reading.rows]
    infos = [replace(info, key="", shard="", input_text="", target_text="") for info in reading.infos]
    return Reading(rows, infos, reading.statistics)


def opened_by_all(open_one: Callable[[], Stream]) -> Stream:
    """What `open_one` returns, on every rank; a collective.

    Where it raises on one rank, whose disk is another than the others', all raise the same: none waits for it.
    """
    stream, found = None, None
    try:
        stream = open_one()
    except (ReadingStopped, ConfigurationError) as error:
        found = error
    raise_everywhere(found)
    assert stream is not None
    return stream


def open_stream(config: RunConfig, tokenizer: Tokenizer, mixture: Mixture, split: str) -> Stream:
    """One split of a mixture at the resolution of `config`; a read ends while the other ranks still wait for it."""
    tokens_per_image = config.vit.num_tokens(config.model.image_size)
    data = replace(config.data, retry_s=min(config.data.retry_s, config.parallel.timeout_s / 4))
    return Stream(data, mixture, tokenizer, config.model.image_size, tokens_per_image, split, config.run.seed)
