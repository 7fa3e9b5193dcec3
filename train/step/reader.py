"""Read a step's data once per replica, convert it for the engine, and reduce its statistics over all ranks.

A replica is the ranks of one data-parallel rank. Its leader reads and broadcasts, so an image is fetched and decoded
once a replica. The other ranks cannot pack rows from the texts alone, because an unreadable image drops its example.
Token ids are sent to all; pixels to the first pipeline stage only (elsewhere `images` has 0 channels). Texts, which the
leader writes to files, are sent to no rank.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist

from common.errors import ConfigurationError, ReadingStopped
from data.config import Mixture
from data.examples import ExampleInfo
from data.packing import Rows
from data.reading.reader import Convert, Reader
from data.stream import HeldOut, StepData, Stream, evaluation_batches, held_out_example
from data.tokenizer import Tokenizer
from model.batch import MicroBatch
from parallel.layout import Layout
from train.config import RunConfig
from train.settings.facts import facts_of_all
from train.step.batch import compact, rank_stats, to_tensors
from train.step.reduction import SkipCauses, StepStats, raise_everywhere, reduce_stats


class HeldOutReader:
    """Read the held-out examples of components, for every rank of a replica; each read is a collective of the replica.

    The leader has opened the components' files, and alone needs `components`.
    """

    def __init__(self, layout: Layout, components: HeldOut | None) -> None:
        self.layout, self._components = layout, components

    @property
    def components(self) -> HeldOut:
        """Return the components that the leader reads."""
        assert self._components is not None
        return self._components

    def held_out(
        self, batch: int, limit: int | None, seed: int = 0, keep: Callable[[ExampleInfo], bool] = lambda info: True
    ) -> Iterator[StepData[Rows]]:
        """Yield every component's records in order, one example a row; equally many batches on every rank.

        `batch`: rows of each. See `data.stream.evaluation_batches`. Where reading ends, the last one is its `error`.
        """
        rank, size = self.layout.data_parallel_rank, self.layout.data_parallel_size
        batches: Iterator[StepData[Rows]] = iter(())
        if self.layout.is_replica_leader:
            batches = evaluation_batches(self.components, batch, limit, rank, size, seed, keep)
        while (data := read_and_broadcast(lambda: next(batches, None), self.layout)) is not None:
            yield data

    def image(self, index: int, limit: int | None, seed: int = 0) -> np.ndarray | None:
        """Read the image of a held-out example once more, uint8 [S, S, 3]; None where that fails."""
        try:
            example = held_out_example(self.components, index, limit, seed)
        except ReadingStopped:
            return None  # no other rank reads at the same time -> an error could not be raised on all
        return example.images[0] if example is not None and len(example.images) else None


class ReplicaReader(HeldOutReader):
    """Read one split of a mixture, for every rank of a replica; each read is a collective of the replica.

    The leader opens the shards. `facts` are what the sources hold.
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
        """Open the shards; a collective of all ranks. `config`: that of the phase.

        `prefetch`: steps to read ahead, by default `data.prefetch`. Raises on every rank what one rank raises, and
        ConfigurationError where their shards differ.
        """
        self.micro_batch_size, self.prefetch = config.parallel.micro_batch_size, prefetch
        self.convert: Convert = lambda rows: rows
        open_one = partial(open_stream, config, tokenizer, mixture, split)
        self._stream = open_on_all_ranks(open_one if layout.is_replica_leader else lambda: None)
        super().__init__(layout, self._stream)
        self.facts = facts_of_all(self._stream, config, layout, split)
        if self._stream is not None and layout.data_parallel_rank:
            self._stream.ledger.drain()  # every rank counted the same in opening -> one replica reports it

    @cached_property
    def reader(self) -> Reader:
        """Start the reader of a replica leader."""
        rank, size = self.layout.data_parallel_rank, self.layout.data_parallel_size
        assert self._stream is not None
        return Reader(self._stream, rank, size, self.micro_batch_size, self.prefetch, self.convert)

    def convert_ahead(self, convert: Convert) -> bool:
        """Convert micro-batches in the background, and return whether that is done: for a replica of one rank only.

        Other ranks need arrays, which `read_and_broadcast` sends. To be called before the first `read`.
        """
        if self.layout.model_group.size() == 1:
            assert "reader" not in vars(self)
            self.convert = convert
        return self.layout.model_group.size() == 1

    def read(self, step: int) -> StepData[Any]:
        """Return the replica's data of a step, as `convert_ahead` has it; where reading ends, only its `error`."""
        data = read_and_broadcast(lambda: self.reader.read(step), self.layout)
        assert data is not None
        return data

    def close(self) -> None:
        """Stop reading ahead."""
        if "reader" in vars(self):
            self.reader.close()


class StepReader:
    """Read the micro-batches of each step of one split, and reduce their statistics over all ranks.

    A rank that is a replica by itself has them converted to tensors, and page-locked, steps ahead in the background.
    The ranks of a larger replica convert what their leader has sent.
    """

    def __init__(self, config: RunConfig, layout: Layout, reader: ReplicaReader) -> None:
        """`config`: that of the phase."""
        self.config, self.layout, self.reader = config, layout, reader
        self.causes = SkipCauses()
        self.empty: MicroBatch | None = None  # without examples; the same in every step
        self.ahead = reader.convert_ahead(self._convert)

    def read(self, step: int) -> StepData[MicroBatch]:
        """Return this rank's data of a step; where reading ends, only its `error`, which `reduce` raises.

        `data_wait_s` is the time of this call, but that of the wait for the leader.
        """
        began = time.perf_counter()
        data = self.reader.read(step)
        if not self.layout.is_replica_leader:
            began = time.perf_counter()
        batches = data.micro_batches if self.ahead else self._convert(data.micro_batches)
        return StepData(batches, data.infos, data.skipped, time.perf_counter() - began, data.error)

    def _convert(self, micro_batches: list[Rows]) -> list[MicroBatch]:
        """Return micro-batches as the engine takes them."""
        batches = [to_tensors(rows) for rows in micro_batches]
        if self.empty is None and batches:
            self.empty = self._compact(batches[0].emptied())
        compacted = map(self._compact, batches)
        pin = self.layout.device.type == "cuda" and torch.cuda.is_available()
        return [batch.pinned() if pin else batch for batch in compacted]

    def reduce(self, data: StepData[MicroBatch], **own: Any) -> StepStats:
        """Return the step's statistics over all ranks; a collective. `own`: more fields of this rank's `RankStats`.

        Raises ReadingStopped on every rank where reading ended on one.
        """
        return reduce_stats(replace(rank_stats(data, self.empty, self.config), **own), self.causes, self.layout)

    def fill(self, data: StepData[MicroBatch], stats: StepStats) -> list[MicroBatch]:
        """Return the micro-batches, with empty ones added until this rank has as many as every other."""
        assert self.empty is not None
        return data.micro_batches + [self.empty] * (stats.num_micro_batches - len(data.micro_batches))

    def _compact(self, batch: MicroBatch) -> MicroBatch:
        return compact(batch, self.config, self.layout.device)


def read_and_broadcast(read: Callable[[], StepData[Rows] | None], layout: Layout) -> StepData[Rows] | None:
    """Call `read` on the replica leader and return its result on every rank of the replica; a collective of them.

    An error that ends reading becomes the `error` of the result: all ranks of the run raise it together, later.
    """
    data = None
    if layout.is_replica_leader:
        try:
            data = read()
        except ReadingStopped as error:
            data = StepData([], [], error=error)
    if layout.model_group.size() == 1:
        return data
    message: list[Any] = [data and _without_texts_and_pixels(data)]
    dist.broadcast_object_list(message, group=layout.model_group, group_src=0, device=torch.device("cpu"))
    if not layout.is_replica_leader:
        data = message[0]
    if data is not None and layout.pipeline_group.rank() == 0 and layout.tensor_group.size() > 1:
        for rows in data.micro_batches:
            if len(rows["images"]):
                _send_pixels(rows, layout)
    return data


def _send_pixels(rows: Rows, layout: Layout) -> None:
    """Send pixels from the replica leader to its peers of the first stage, the first ranks of the replica.

    Under NCCL only the group of a replica can send tensors of the host.
    """
    if layout.is_replica_leader:
        pixels = torch.from_numpy(rows["images"])
        peers = range(1, layout.tensor_group.size())
        for sent in [dist.isend(pixels, group=layout.model_group, group_dst=peer) for peer in peers]:
            assert sent is not None
            sent.wait()
    else:
        rows["images"] = np.empty((*rows["images"].shape[:-1], 3), np.uint8)
        dist.recv(torch.from_numpy(rows["images"]), group=layout.model_group, group_src=0)


def _without_texts_and_pixels(data: StepData[Rows]) -> StepData[Rows]:
    """Return what the other ranks of a replica need: images without channels, and infos that are only counted."""
    rows = [cast(Rows, {**each, "images": each["images"][..., :0]}) for each in data.micro_batches]
    infos = [replace(info, key="", shard="", input_text="", target_text="", references=()) for info in data.infos]
    return StepData(rows, infos, data.skipped, error=data.error)


def open_on_all_ranks(open_one: Callable[[], Stream | None]) -> Stream | None:
    """Return what `open_one` returns; a collective.

    Where it raises on one rank, whose disk may differ from the others', every rank raises the same.
    """
    stream, found = None, None
    try:
        stream = open_one()
    except (ReadingStopped, ConfigurationError) as error:
        found = error
    raise_everywhere(found)
    return stream


def open_stream(config: RunConfig, tokenizer: Tokenizer, mixture: Mixture, split: str) -> Stream:
    """Open one split of a mixture at the resolution of `config`.

    Reads are retried for a quarter of the time-out at most, so that they end while the other ranks still wait.
    """
    tokens_per_image = config.vit.num_tokens(config.model.image_size)
    data = replace(config.data, retry_s=min(config.data.retry_s, config.parallel.timeout_s / 4))
    return Stream(data, mixture, tokenizer, config.model.image_size, tokens_per_image, split, config.run.seed)
