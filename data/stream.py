"""Read the examples of each step as packed rows, ahead in the background, and held-out examples in order.

A step number is the whole state: the rows of a step depend on nothing that was read before.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Generic, Protocol, TypeVar

from common.errors import ConfigurationError, ReadingStopped
from common.progress import beat
from data.config import DataConfig, Mixture
from data.error_budget import Ledger
from data.examples import EncodedExample, ExampleInfo
from data.mixture import mix, open_components
from data.packing import Rows, RowShape, concatenate, micro_batches, pack
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

    Step t, counted from 1, has examples [(t-1)*N, t*N) of the mixture, N = data.global_batch_size. They are dealt, as
    contiguous slices, to data.num_streams streams, and each stream packs its own examples of the step into rows. So the
    rows of a (step, stream) are a pure function of (configuration, seed), whatever rank reads them.
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
        self.examples_per_stream = data.global_batch_size // data.num_streams
        self.prefetch = data.prefetch
        self.shape = RowShape(
            data.encoder_length, data.decoder_length, data.images_per_row, image_size, tokens_per_image
        )
        self.ledger = Ledger(data.error_budget, data.error_budget_minimum, data.error_window)
        self.components = open_components(data, mixture, tokenizer, image_size, split, self.ledger)
        self._examples = mix(self.components, seed)
        self._threads = ThreadPoolExecutor(data.num_threads, thread_name_prefix="examples")

    def facts(self) -> dict[str, SourceFacts]:
        """Return what each source holds, by its name."""
        return {component.source.name: component.source.facts for component in self.components}

    def rows(self, step: int, streams: range) -> tuple[Rows, list[ExampleInfo]]:
        """Return the rows of these streams in a step, in order of stream, and infos in order of example.

        Raises ReadingStopped where records cannot be read, or too many of them are broken.
        """
        size = self.examples_per_stream
        first = ((step - 1) * self.num_streams + streams.start) * size
        examples = list(self._threads.map(self._examples.__getitem__, range(first, first + len(streams) * size)))
        packed = [
            pack([example for example in examples[start : start + size] if example is not None], self.shape)
            for start in range(0, len(examples), size)
        ]
        infos, num_rows = [], 0
        for part, part_infos in packed:
            infos += [replace(info, step=step, row=info.row + num_rows) for info in part_infos]
            num_rows += len(part["encoder_tokens"])
        return concatenate([part for part, _ in packed], self.shape), infos


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
