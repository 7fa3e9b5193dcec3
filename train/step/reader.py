"""Read a step's rows once per replica, and send them to its ranks.

A replica is the ranks of one data-parallel rank. Its leader reads and broadcasts, so an image is fetched and decoded
once a replica. The other ranks cannot pack rows from the texts alone, because an unreadable image drops its example.
Token ids are sent to all; pixels to the first pipeline stage only (elsewhere `images` has 0 channels). Texts, which the
leader writes to files, are sent to no rank.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from common.errors import ConfigurationError, ReadingStopped
from data.config import Mixture
from data.examples import ExampleInfo
from data.packing import Rows
from data.reading.reader import Reader
from data.stream import HeldOut, StepData, Stream, evaluation_batches, held_out_example
from data.tokenizer import Tokenizer
from parallel.layout import Layout
from train.config import RunConfig
from train.settings.facts import facts_of_all
from train.step.reduction import raise_everywhere

Beside = TypeVar("Beside")


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
    """Read one split of a mixture on the leader of a replica, which opens the shards.

    `facts` are what the sources hold.
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
        self.micro_batch_size = config.parallel.micro_batch_size
        self.prefetch = config.data.prefetch if prefetch is None else prefetch
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
        # `StepReader` holds `prefetch` steps -> this reads one more, or as many as its processes.
        return Reader(self._stream, rank, size, self.micro_batch_size, min(self.prefetch, 1))

    def read(self, step: int) -> StepData[Rows]:
        """Return the replica's rows of a step, on its leader; where reading ends, only its `error`."""
        data = read_or_error(lambda: self.reader.read(step))
        assert data is not None
        return data

    def close(self) -> None:
        """Stop reading ahead."""
        if "reader" in vars(self):
            self.reader.close()


def read_or_error(read: Callable[[], StepData[Rows] | None]) -> StepData[Rows] | None:
    """Call `read`; an error that ends reading becomes the `error` of the result: all ranks raise it together, later."""
    try:
        return read()
    except ReadingStopped as error:
        return StepData([], [], error=error)


def read_and_broadcast(read: Callable[[], StepData[Rows] | None], layout: Layout) -> StepData[Rows] | None:
    """Call `read` on the replica leader and return its result on every rank of the replica; a collective of them.

    An error that ends reading becomes the `error` of the result.
    """
    data = read_or_error(read) if layout.is_replica_leader else None
    return broadcast(data, None, layout, layout.model_group)[0]


def broadcast(
    data: StepData[Rows] | None, beside: Beside, layout: Layout, replica: dist.ProcessGroup
) -> tuple[StepData[Rows] | None, Beside]:
    """Return the leader's data, and what it sends beside them, on every rank of its replica; a collective of them.

    `replica`: the group that sends; its ranks are those of `layout.model_group`.
    """
    if replica.size() == 1:
        return data, beside
    message: list[Any] = [data and _without_texts_and_pixels(data), beside]
    dist.broadcast_object_list(message, group=replica, group_src=0, device=torch.device("cpu"))
    if not layout.is_replica_leader:
        data, beside = message
    if data is not None and layout.pipeline_group.rank() == 0 and layout.tensor_group.size() > 1:
        for rows in data.micro_batches:
            if len(rows["images"]):
                _send_pixels(rows, layout, replica)
    return data, beside


def _send_pixels(rows: Rows, layout: Layout, replica: dist.ProcessGroup) -> None:
    """Send pixels from the replica leader to its peers of the first stage, the first ranks of the replica.

    Under NCCL only the group of a replica can send tensors of the host.
    """
    if layout.is_replica_leader:
        pixels = torch.from_numpy(rows["images"])
        peers = range(1, layout.tensor_group.size())
        for sent in [dist.isend(pixels, group=replica, group_dst=peer) for peer in peers]:
            assert sent is not None
            sent.wait()
    else:
        rows["images"] = np.empty((*rows["images"].shape[:-1], 3), np.uint8)
        dist.recv(torch.from_numpy(rows["images"]), group=replica, group_src=0)


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
