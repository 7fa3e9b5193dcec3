"""Read the examples of each step as packed rows, ahead in the background, and held-out examples in order.

A step number is the whole state: the rows of a step depend on nothing that was read before.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from common.errors import ReadingStopped
from common.progress import beat
from data.config import DataConfig, Mixture
from data.error_budget import Ledger
from data.examples import EncodedExample, ExampleInfo, TextExample
from data.mixture import Source, mix, open_components
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
        sources: Mapping[str, Source] | None = None,
        ledger: Ledger | None = None,
    ):
        """Open the shards of a split; raise ConfigurationError for a configuration that cannot work.

        `sources`: those of the mixture by name, where another process has opened them. `ledger` counts the records.
        """
        data.check()
        data.check_images(tokens_per_image)
        self.num_streams = data.num_streams
        self.pool_streams = data.pool_streams
        self.pool_examples = data.global_batch_size // data.num_streams * self.pool_streams
        self.prefetch = data.prefetch
        self.shape = RowShape(
            data.encoder_length, data.decoder_length, data.images_per_row, image_size, tokens_per_image
        )
        self.cut = replace(self.shape, decoder_length=data.longest_target)  # what the texts of an example are cut to
        self.arguments = (data, mixture, tokenizer, image_size, tokens_per_image, split, seed)
        self.ledger = ledger or Ledger(data.error_budget, data.error_budget_minimum, data.error_window)
        self.components = open_components(data, mixture, tokenizer, image_size, split, self.ledger, sources)
        self._examples = mix(self.components, seed)
        self._component = {component.name: component for component in self.components}
        # One thread needs no pool -> no switch between threads for each record.
        threads = ThreadPoolExecutor(data.num_threads, thread_name_prefix="examples") if data.num_threads > 1 else None
        self._map: Callable[..., Iterator[Any]] = map if threads is None else threads.map

    def facts(self) -> dict[str, SourceFacts]:
        """Return what each source holds, by its name."""
        return {component.source.name: component.source.facts for component in self.components}

    def rows(
        self, step: int, streams: range, multiple: int = 1, make: Callable[[int], Rows] | None = None
    ) -> tuple[Rows, list[ExampleInfo]]:
        """Return the rows of these streams in a step, in order of stream, and infos in order of example.

        Empty rows are added up to a multiple of `multiple`. `make` returns that number of empty rows in memory of the
        caller's. Raises ReadingStopped where records cannot be read, or too many of them are broken.
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
        padded = -(-num_rows // multiple) * multiple
        rows, infos = fill_rows(
            self._map(self._with_image, [text for _, _, text in own]),
            np.array([row for _, row, _ in own], np.int64),
            padded,
            self.shape,
            make(padded) if make is not None else None,
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
            return text and truncate(text, self.cut)

        found = [(number, text) for number, text in zip(numbers, self._map(read, numbers), strict=True) if text]
        return [number for number, _ in found], [text for _, text in found]

    def _with_image(self, text: TextExample) -> EncodedExample | None:
        return self._component[text.info.component].with_image(text)


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
