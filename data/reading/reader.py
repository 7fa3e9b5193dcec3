"""Read the micro-batches of one data-parallel rank ahead, in a thread or in processes."""

import logging
import os
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, NamedTuple

from common.errors import ConfigurationError, Notice, ReadingStopped
from data.error_budget import Event
from data.packing import Rows, micro_batches
from data.reading.process import ProcessEnded, ReadingProcess, Recipe
from data.shards.source import ShardSource
from data.stream import StepData, Stream

logger = logging.getLogger(__name__)

MOST_ENDS = 3  # times that the processes that read one step may end before reading stops


class _Read(NamedTuple):
    """A step as it was read, and what is counted once it is used."""

    data: StepData[Rows]
    counted: list[Event]


class Reader:
    """Read the micro-batches of one data-parallel rank, `prefetch` steps ahead in the background.

    Rank r of D reads streams [r*S/D, (r+1)*S/D) of S. An error in the background is raised by `read` of that step.
    With `data.num_workers` processes read, each a step at a time; one that is killed is started again, and reads the
    step once more. What they count is counted here when the step is used, in order of steps.
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
        self._processes = _processes(stream) if self._prefetch else []
        self._prefetch = max(self._prefetch, len(self._processes))
        self._idle = SimpleQueue[int]()
        for number in range(len(self._processes)):
            self._idle.put(number)
        self._threads = ThreadPoolExecutor(max(len(self._processes), 1), thread_name_prefix="reader")
        self._prepared: dict[int, Future[_Read]] = {}

    def read(self, step: int) -> StepData[Rows]:
        """Return the data of a step; any order of steps is possible, consecutive steps are the fastest."""
        began = time.perf_counter()
        wanted = range(step, step + self._prefetch + 1)
        for stale in [ahead for ahead in self._prepared if ahead not in wanted]:
            self._prepared.pop(stale).cancel()
        prepare = self._from_process if self._processes else self._from_here
        for ahead in wanted:
            if ahead not in self._prepared:
                self._prepared[ahead] = self._threads.submit(prepare, ahead)
        data, counted = self._prepared.pop(step).result()
        ledger = self._stream.ledger
        ledger.replay(counted)
        skipped = data.skipped if not self._processes else ledger.drain()
        return replace(data, skipped=skipped, data_wait_s=time.perf_counter() - began)

    def close(self) -> None:
        """Stop reading ahead."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        processes, self._processes = self._processes, []
        for process in processes:
            process.close()

    def _from_here(self, step: int) -> _Read:
        rows, infos = self._stream.rows(step, self._streams, self._micro_batch_size)
        batches = micro_batches(rows, self._micro_batch_size, self._stream.shape)
        return _Read(StepData(batches, infos, skipped=self._stream.ledger.drain()), [])

    def _from_process(self, step: int) -> _Read:
        number = self._idle.get()
        try:
            rows, infos, counted = self._patiently(number, step)
        finally:
            self._idle.put(number)
        batches = micro_batches(rows, self._micro_batch_size, self._stream.shape)
        return _Read(StepData(batches, infos), counted)

    def _patiently(self, number: int, step: int) -> tuple[Rows, list[Any], list[Event]]:
        """Read a step in process `number`, which is started again where it ends."""
        for _ in range(MOST_ENDS):
            try:
                return self._processes[number].read(step, self._streams, self._micro_batch_size)
            except ProcessEnded as ended:
                why = str(ended)
                if not self._processes:  # closed meanwhile
                    raise
                logger.warning("a process that reads step %d ended with %s; it is started again", step, why)
                self._processes[number].close()
                self._processes[number] = ReadingProcess(_recipe(self._stream))
        raise ReadingStopped(
            f"{MOST_ENDS} processes that read step {step} ended with {why}, the last of them; lower "
            f"data.num_workers={len(self._processes)} if the memory was not enough, or set it to 0 to see the error."
        )


def _processes(stream: Stream) -> list[ReadingProcess]:
    """Start the processes of `data.num_workers`; none where an index cannot be opened a second time."""
    number = stream.arguments[0].num_workers
    recipe = _recipe(stream)
    lost = [
        one.name
        for one in recipe.sources.values()
        if isinstance(one, ShardSource) and not os.path.exists(one.index.path)
    ]
    if number and lost:
        warnings.warn(
            f"data.num_workers={number} is not used: the index of source {lost[0]} cannot be kept; set "
            "data.index_folder.",
            Notice,
            stacklevel=2,
        )
        return []
    return [ReadingProcess(recipe) for _ in range(number)]


def _recipe(stream: Stream) -> Recipe:
    sources = {component.source.name: component.source for component in stream.components}
    return Recipe(*stream.arguments, sources, stream.shape)
