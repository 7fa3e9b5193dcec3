"""A step number is the whole state: steps as rows, read ahead in the background, and held-out examples in order."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice

from common.errors import ConfigurationError
from common.progress import beat
from data.config import DataConfig, Mixture
from data.error_budget import Ledger
from data.examples import EncodedExample, ExampleInfo
from data.mixture import mix, open_components
from data.packing import Rows, RowShape, concatenate, micro_batches, pack
from data.shards.source import SourceFacts
from data.tokenizer import Tokenizer


class Stream:
    """Step t, counted from 1, is examples [(t-1)*N, t*N) of the mixture, N = data.global_batch_size.

    They are dealt, as contiguous slices, to data.num_streams streams; each stream packs its own examples of the step
    into rows. So the rows of a (step, stream) are a pure function of (configuration, seed), whoever reads them.
    Raises ConfigurationError for a configuration that cannot work, and at any read ReadingStopped.
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
        """What was found of each source, by its name."""
        return {component.source.name: component.source.facts for component in self.components}

    def rows(self, step: int, streams: range) -> tuple[Rows, list[ExampleInfo]]:
        """The rows of these streams in this step, in order of stream; infos in order of example."""
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


@dataclass(frozen=True)
class Statistics:
    """What one rank read in one step.

    skipped: number per "source/cause" since the last step. truncated: examples whose text was cut to fit a row.
    """

    skipped: dict[str, int]
    truncated: int


class Reader:
    """The micro-batches of one data-parallel rank, prepared `prefetch` steps ahead by a background thread.

    Rank r of D reads streams [r*S/D, (r+1)*S/D) of S. What goes wrong in the thread is raised by `read` of that step.
    """

    def __init__(
        self,
        stream: Stream,
        data_parallel_rank: int,
        data_parallel_size: int,
        micro_batch_size: int,
        prefetch: int | None = None,
    ):
        if stream.num_streams % data_parallel_size:
            raise ConfigurationError(
                f"data.num_streams={stream.num_streams} cannot be dealt evenly to {data_parallel_size} data-parallel "
                f"ranks: make it a multiple of {data_parallel_size}."
            )
        share = stream.num_streams // data_parallel_size
        self._stream = stream
        self._streams = range(data_parallel_rank * share, (data_parallel_rank + 1) * share)
        self._micro_batch = micro_batch_size
        self._prefetch = stream.prefetch if prefetch is None else prefetch
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._prepared: dict[int, Future[tuple[list[Rows], list[ExampleInfo], Statistics]]] = {}

    def read(self, step: int) -> tuple[list[Rows], list[ExampleInfo], Statistics]:
        """(micro-batches, infos, statistics) of a step; steps may be asked for in any order, fastest one after another.

        Row r of an info lies in micro-batch r // micro_batch_size, at r % micro_batch_size.
        """
        wanted = range(step, step + self._prefetch + 1)
        for stale in [ahead for ahead in self._prepared if ahead not in wanted]:
            self._prepared.pop(stale).cancel()
        for ahead in wanted:
            if ahead not in self._prepared:
                self._prepared[ahead] = self._thread.submit(self._prepare, ahead)
        return self._prepared.pop(step).result()

    def close(self) -> None:
        """Stops reading ahead."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, step: int) -> tuple[list[Rows], list[ExampleInfo], Statistics]:
        rows, infos = self._stream.rows(step, self._streams)
        batches = micro_batches(rows, self._micro_batch, self._stream.shape)
        return batches, infos, Statistics(self._stream.ledger.drain(), sum(info.truncated for info in infos))


def evaluation_batches(
    stream: Stream,
    micro_batch_size: int,
    limit: int | None = None,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
    seed: int = 0,
    keep: Callable[[ExampleInfo], bool] = lambda info: True,
) -> Iterator[tuple[Rows, list[ExampleInfo]]]:
    """Every component's records in order (the first `limit` of each), one example a row and one image slot a row.

    Yields equally many batches of exactly `micro_batch_size` rows on every rank; infos are those of the leading rows,
    the rest is empty. Records that their objective skips, and examples that are not to `keep`, leave no gap: the last
    batches are empty instead.
    """
    shape = replace(stream.shape, images_per_row=1)
    num_places, stride = sum(_lengths(stream, limit)), micro_batch_size * data_parallel_size
    mine = (
        place
        for start in range(data_parallel_rank * micro_batch_size, num_places, stride)
        for place in range(start, min(start + micro_batch_size, num_places))
    )
    found = (held_out_example(stream, place, limit, seed) for place in mine)
    kept = (example for example in found if example is not None and keep(example.info))
    for _ in range(-(-num_places // stride)):
        packed = [pack([example], shape) for example in islice(kept, micro_batch_size)]
        infos = [replace(info, row=row) for row, (_, (info,)) in enumerate(packed)]
        empty = pack([], shape)[0]
        (batch,) = micro_batches(concatenate([empty, *(rows for rows, _ in packed)], shape), micro_batch_size, shape)
        yield batch, infos


def held_out_example(stream: Stream, place: int, limit: int | None, seed: int) -> EncodedExample | None:
    """The example of the held-out record at a place: the first `limit` records of a component, then the next one's."""
    beat()
    number = place
    for component, length in zip(stream.components, _lengths(stream, limit), strict=True):
        if number < length:
            example = component.held_out(number, seed)
            return example and replace(example, info=replace(example.info, place=place))
        number -= length
    raise IndexError(place)


def _lengths(stream: Stream, limit: int | None) -> list[int]:
    """The number of held-out records of each component."""
    lengths = [len(component.source) for component in stream.components]
    return lengths if limit is None else [min(length, limit) for length in lengths]
