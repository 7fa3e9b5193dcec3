"""Read the examples of each step as packed rows, ahead in the background, and held-out examples in order.

A step number is the whole state: the rows of a step depend on nothing that was read before.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from common.errors import ConfigurationError, ReadingStopped
from common.progress import beat
from data.config import DataConfig, Mixture
from data.error_budget import Ledger
from data.examples import EncodedExample, ExampleInfo, TextExample
from data.mixture import mix, open_components
from data.packing import Rows, RowShape, concatenate, fill_rows, micro_batches, pack, place, truncate
from data.row_assignment import stream_of_rows
from data.shards.source import SourceFacts
from data.tokenizer import Tokenizer

Batch = TypeVar("Batch")


class HeldOutComponent(Protocol):
    """A component as an evaluation reads it: items in order, each made to the same example every time."""

    @property
    def num_held_out(self) -> int:
        """Return the number of items."""

    def held_out(self, number: int, seed: int) -> EncodedExample | None:
        """Make the example of an item, None where there is none to make."""


class HeldOut(Protocol):
    """Components to evaluate, and the shape of their rows."""

    @property
    def shape(self) -> RowShape:
        """Return the shape of a row."""

    @property
    def components(self) -> Sequence[HeldOutComponent]:
        """Return the components, in order."""


@dataclass
class StepData(Generic[Batch]):
    """One rank's data of one step, from the reader to the engine.

    Micro-batches are arrays (`Rows`) as they are read, and tensors (`model.batch.MicroBatch`) once
    `train/step/batch.py` has converted them.
    """

    micro_batches: list[Batch]
    """At least one, unless reading has ended with an `error`."""
    infos: list[ExampleInfo]
    """One per example. As read, row r of an info lies in micro-batch r // micro_batch_size, at r % micro_batch_size."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Records that were skipped since the reader's last step, by "<source>/<cause>"."""
    data_wait_s: float = 0.0
    """Seconds that this rank waited for the data; 0 where the replica leader read them."""
    error: ReadingStopped | None = None
    """The error that ended reading. It is raised on all ranks together (`train/step/reduction.py`)."""

    @property
    def truncated(self) -> int:
        """Count the examples whose text was cut to fit a row."""
        return sum(info.truncated for info in self.infos)


class Stream:
    """Pack the examples of each step of a mixture into rows.

    Step t, counted from 1, has examples [(t-1)*N, t*N) of the mixture, N = data.global_batch_size. They are cut, as
    contiguous slices, into pools of data.pool_examples (or more: a pool is a whole number of streams). A pool is packed
    from its texts alone, and its rows are dealt to its streams. So the rows of a (step, stream) are a pure function of
    (configuration, seed), whatever rank reads them. A rank reads the texts of the pools that its streams belong to,
    and the images of its own rows; an image that cannot be used leaves a hole in its row.
    """

    def __init__(
        self,
        data: DataConfig,
        mixture: Mixture,
        tokenizer: Tokenizer,
        image_size: int,
        tokens_per_image: int,
        split: str,
        seed: int,
    ):
        """Open the shards of a split; raise ConfigurationError for a configuration that cannot work."""
        data.check()
        data.check_images(tokens_per_image)
        self.num_streams = data.num_streams
        self.pool_streams = data.pool_streams
        self.pool_examples = data.global_batch_size // data.num_streams * self.pool_streams
        self.prefetch = data.prefetch
        self.shape = RowShape(
            data.encoder_length, data.decoder_length, data.images_per_row, image_size, tokens_per_image
        )
        self.ledger = Ledger(data.error_budget, data.error_budget_minimum, data.error_window)
        self.components = open_components(data, mixture, tokenizer, image_size, split, self.ledger)
        self._examples = mix(self.components, seed)
        self._component = {component.name: component for component in self.components}
        # One thread needs no pool -> no switch between threads for each record.
        threads = ThreadPoolExecutor(data.num_threads, thread_name_prefix="examples") if data.num_threads > 1 else None
        self._map: Callable[..., Iterator[Any]] = map if threads is None else threads.map

    def facts(self) -> dict[str, SourceFacts]:
        """Return what each source holds, by its name."""
        return {component.source.name: component.source.facts for component in self.components}

    def rows(self, step: int, streams: range) -> tuple[Rows, list[ExampleInfo]]:
        """Return the rows of these streams in a step, in order of stream, and infos in order of example.

        Raises ReadingStopped where records cannot be read, or too many of them are broken.
        """
        own: list[tuple[int, int, TextExample]] = []  # number of the example, its row, itself
        num_rows = 0
        for pool in range(streams.start // self.pool_streams, -(-streams.stop // self.pool_streams)):
            numbers, texts = self._texts(step, pool, streams)
            row_of, pool_rows = place(texts, self.shape, self.pool_streams)
            dealt = stream_of_rows(pool_rows, self.pool_streams) + pool * self.pool_streams
            kept = np.flatnonzero((dealt >= streams.start) & (dealt < streams.stop))
            new_row = np.full(pool_rows, -1)
            new_row[kept] = num_rows + np.arange(len(kept))
            num_rows += len(kept)
            own += [one for one in zip(numbers, new_row[row_of].tolist(), texts, strict=True) if one[1] >= 0]
        read = list(self._map(self._with_image, [text for _, _, text in own]))
        found = [(row, example) for (_, row, _), example in zip(own, read, strict=True) if example is not None]
        rows, infos = fill_rows(
            [example for _, example in found], np.array([row for row, _ in found], np.int64), num_rows, self.shape
        )
        return rows, [replace(info, step=step) for info in infos]

    def _texts(self, step: int, pool: int, streams: range) -> tuple[list[int], list[TextExample]]:
        """Return the examples of a pool up to their images, and their numbers.

        What cannot be used is counted by one rank only: by the one whose share of the numbers it is in.
        """
        size = self.pool_examples // self.pool_streams
        first = (step - 1) * self.num_streams * size
        numbers = range(first + pool * self.pool_examples, first + (pool + 1) * self.pool_examples)
        own = range(first + streams.start * size, first + streams.stop * size)

        def read(number: int) -> TextExample | None:
            with nullcontext() if number in own else self.ledger.muted():
                text = self._examples[number]
            return text and truncate(text, self.shape)

        found = [(number, text) for number, text in zip(numbers, self._map(read, numbers), strict=True) if text]
        return [number for number, _ in found], [text for _, text in found]

    def _with_image(self, text: TextExample) -> EncodedExample | None:
        return self._component[text.info.component].with_image(text)


class Reader:
    """Read the micro-batches of one data-parallel rank, `prefetch` steps ahead in a background thread.

    Rank r of D reads streams [r*S/D, (r+1)*S/D) of S. An error in the thread is raised by `read` of that step.
    """

    def __init__(
        self,
        stream: Stream,
        data_parallel_rank: int,
        data_parallel_size: int,
        micro_batch_size: int,
        prefetch: int | None = None,
    ):
        """Prepare to read; `prefetch` None is that of the stream's configuration.

        Raises ConfigurationError where the streams cannot be dealt evenly to the ranks.
        """
        if stream.num_streams % data_parallel_size:
            raise ConfigurationError(
                f"data.num_streams={stream.num_streams} cannot be dealt evenly to {data_parallel_size} data-parallel "
                f"ranks: make it a multiple of {data_parallel_size}."
            )
        share = stream.num_streams // data_parallel_size
        self._stream = stream
        self._streams = range(data_parallel_rank * share, (data_parallel_rank + 1) * share)
        self._micro_batch_size = micro_batch_size
        self._prefetch = stream.prefetch if prefetch is None else prefetch
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._prepared: dict[int, Future[StepData[Rows]]] = {}

    def read(self, step: int) -> StepData[Rows]:
        """Return the data of a step; any order of steps is possible, consecutive steps are the fastest."""
        began = time.perf_counter()
        wanted = range(step, step + self._prefetch + 1)
        for stale in [ahead for ahead in self._prepared if ahead not in wanted]:
            self._prepared.pop(stale).cancel()
        for ahead in wanted:
            if ahead not in self._prepared:
                self._prepared[ahead] = self._thread.submit(self._prepare, ahead)
        data = self._prepared.pop(step).result()
        return replace(data, data_wait_s=time.perf_counter() - began)

    def close(self) -> None:
        """Stop reading ahead."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, step: int) -> StepData[Rows]:
        rows, infos = self._stream.rows(step, self._streams)
        batches = micro_batches(rows, self._micro_batch_size, self._stream.shape)
        return StepData(batches, infos, skipped=self._stream.ledger.drain())


def evaluation_batches(
    stream: HeldOut,
    micro_batch_size: int,
    limit: int | None = None,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
    seed: int = 0,
    keep: Callable[[ExampleInfo], bool] = lambda info: True,
) -> Iterator[StepData[Rows]]:
    """Yield every component's items in order (the first `limit` of each), one example and one image slot a row.

    Every rank yields equally many single micro-batches of exactly `micro_batch_size` rows; infos are those of the
    leading rows, the rest is empty. Records that their objective skips, and examples that `keep` rejects, leave no gap:
    the last batches are empty instead.
    """
    shape = replace(stream.shape, images_per_row=1)
    num_records, stride = sum(_lengths(stream, limit)), micro_batch_size * data_parallel_size
    own = (
        index
        for start in range(data_parallel_rank * micro_batch_size, num_records, stride)
        for index in range(start, min(start + micro_batch_size, num_records))
    )
    found = (held_out_example(stream, index, limit, seed) for index in own)
    kept = (example for example in found if example is not None and keep(example.info))
    for _ in range(-(-num_records // stride)):
        packed = [pack([example], shape) for example in islice(kept, micro_batch_size)]
        infos = [replace(info, row=row) for row, (_, (info,)) in enumerate(packed)]
        empty = pack([], shape)[0]
        rows = concatenate([empty, *(part for part, _ in packed)], shape)
        yield StepData(micro_batches(rows, micro_batch_size, shape), infos)


def held_out_example(stream: HeldOut, index: int, limit: int | None, seed: int) -> EncodedExample | None:
    """Return the example of one held-out item, None where its objective skips it.

    `index` counts the first `limit` items of each component, one component after another.
    """
    beat()
    number = index
    for component, length in zip(stream.components, _lengths(stream, limit), strict=True):
        if number < length:
            example = component.held_out(number, seed)
            return example and replace(example, info=replace(example.info, index=index))
        number -= length
    raise IndexError(index)


def _lengths(stream: HeldOut, limit: int | None) -> list[int]:
    """Return the number of held-out items of each component, at most `limit`."""
    lengths = [component.num_held_out for component in stream.components]
    return lengths if limit is None else [min(length, limit) for length in lengths]
